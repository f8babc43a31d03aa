package lab

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// nodeTools is where a node that can be entered by SSH has programs of a machine with systemd, made for the lab. They
// are mounted over /usr/local/bin: /usr is the host's.
const nodeTools = "opt/trivet-tools"

// Where the init of a node and its systemctl meet.
const (
	kubeletPID     = "/run/kubelet.pid"     // written by the init while its kubelet runs
	kubeletStopped = "/run/kubelet.stopped" // there while the kubelet is not to run
)

// systemctl stops, starts and shows the kubelet, and returns once it is so, as systemd's does.
const systemctl = `#!/bin/bash
runs() { [ -s ` + kubeletPID + ` ] && kill -0 "$(cat ` + kubeletPID + `)" 2>/dev/null; }
case "$1 $2" in
"stop kubelet")
  : >` + kubeletStopped + `
  while runs; do
    kill "$(cat ` + kubeletPID + `)" 2>/dev/null
    sleep 0.2
  done ;;
"start kubelet")
  rm -f ` + kubeletStopped + `
  until runs; do sleep 0.2; done ;;
"show kubelet") # --property ActiveState --value
  if runs; then echo active; else echo inactive; fi ;;
*)
  echo "systemctl of the lab: stop, start or show kubelet, not: $*" >&2
  exit 1 ;;
esac
`

// crictl finds and stops containers, as far as Kubernetes' own tests do, by containerd's own client.
const crictl = `#!/bin/bash
ctr() { ` + toolsDir + `/deb/usr/bin/ctr -n k8s.io "$@"; }
runs() { # a node has no /etc/alternatives, so no awk
  ctr tasks ls | while read -r id _ status; do
    [ "$id $status" != "$1 RUNNING" ] || echo yes
  done | grep -q yes
}
case "$1 $2 $4 $6" in
"ps --label --name -q") # ps --label io.kubernetes.pod.uid=UID --name NAME -q
  for id in $(ctr containers ls -q "labels.\"${3%%=*}\"==${3#*=},labels.\"io.kubernetes.container.name\"==$5"); do
    if runs "$id"; then echo "$id"; fi
  done ;;
"stop $2  ")
  ctr tasks kill -s SIGTERM "$2" || exit 1
  for _ in $(seq 100); do
    runs "$2" || exit 0
    sleep 0.1
  done
  ctr tasks kill -s SIGKILL "$2" ;;
*)
  echo "crictl of the lab: ps --label L --name N -q, or stop ID, not: $*" >&2
  exit 1 ;;
esac
`

// prepareTools writes them to the root folder of a node.
func prepareTools(n node) error {
	for name, text := range map[string]string{"systemctl": systemctl, "crictl": crictl} {
		if err := writeFile(filepath.Join(n.Root, nodeTools, name), []byte(text), 0o755); err != nil {
			return fmt.Errorf("tools of node %s: %w", n.Name, err)
		}
	}
	return nil
}

// notStopped reports whether a daemon is to run: systemctl may have stopped the kubelet.
func notStopped(daemon string) bool {
	if daemon != "kubelet" {
		return true
	}
	_, err := os.Stat(kubeletStopped)
	return os.IsNotExist(err)
}

// noteKubelet has systemctl know the kubelet's process; 0: it runs no more.
func noteKubelet(pid int) error {
	if pid == 0 {
		if err := os.Remove(kubeletPID); err != nil && !os.IsNotExist(err) {
			return err
		}
		return nil
	}
	return os.WriteFile(kubeletPID, fmt.Appendf(nil, "%d\n", pid), fs.FileMode(0o644))
}
