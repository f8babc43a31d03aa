// Command hello-populator fills PersistentVolumeClaims whose data source is a Hello, as upstream's example of a volume
// populator does (kubernetes-csi/lib-volume-populator), which the module proxy does not have. It takes the flags with
// which Kubernetes' own tests start that (testing-manifests/storage-csi/any-volume-datasource), and works by the same
// protocol: for a claim C whose dataSourceRef names a Hello it makes a claim C' of its own, of the same class and size,
// has a pod write the file into it, gives the PersistentVolume of C' to C, and deletes C'.
//
//	hello-populator --mode=controller --namespace=NS --image-name=IMAGE
//	hello-populator --mode=populate --file-name=PATH --file-contents=TEXT
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"
)

// lookEvery is how often the controller looks at all claims: a lab has few.
const lookEvery = 500 * time.Millisecond

func main() {
	var c controller
	mode := flag.String("mode", "", "controller or populate")
	file := flag.String("file-name", "", "populate: the file to write")
	contents := flag.String("file-contents", "", "populate: what to write")
	flag.StringVar(&c.namespace, "namespace", "hello", "controller: where its own claims and pods are")
	flag.StringVar(&c.image, "image-name", "", "controller: image of the pods, this program's")
	flag.String("http-endpoint", "", "ignored: there are no metrics")
	flag.Parse()
	if err := run(*mode, *file, *contents, &c); err != nil {
		log.Fatal("hello-populator: ", err)
	}
}

func run(mode, file, contents string, c *controller) error {
	switch mode {
	case "populate":
		return populate(file, contents)
	case "controller":
		var err error
		if c.api, err = inCluster(); err != nil {
			return err
		}
		for {
			if err := c.round(); err != nil {
				log.Print("tried again: ", err)
			}
			time.Sleep(lookEvery)
		}
	}
	return fmt.Errorf("--mode=%q: want controller or populate", mode)
}

// populate writes the file and has it on stable storage before it ends: the volume changes hands then.
func populate(name, contents string) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(contents); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
