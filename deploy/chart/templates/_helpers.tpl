{{- define "trivet.driver" -}}csi.trivet.dev{{- end }}

{{- /* Labels of every object. */ -}}
{{- define "trivet.labels" -}}
app.kubernetes.io/name: trivet
{{- if ne .Release.Service "manifests" }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Labels by which pods of a component are selected: they never change. */ -}}
{{- define "trivet.selector" -}}
app.kubernetes.io/name: trivet
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- /* Labels of a pod: (dict "root" $ "component" NAME "labels" MORE). */ -}}
{{- define "trivet.podLabels" -}}
{{ include "trivet.selector" .component }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "trivet.image" -}}
image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{- define "trivet.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "trivet.seed" -}}trivet.{{ .Release.Namespace }}.svc:{{ .Values.node.port }}{{- end }}

{{- define "trivet.socketDir" -}}{{ .Values.kubeletPath }}/plugins/{{ include "trivet.driver" . }}{{- end }}

{{- /* Whether a sidecar is rendered: (dict "root" $ "sidecar" NAME "api" GROUP/VERSION). */ -}}
{{- define "trivet.has" -}}
{{- $enabled := toString (index .root.Values.sidecars .sidecar).enabled }}
{{- if or (eq $enabled "true") (and (eq $enabled "auto") (.root.Capabilities.APIVersions.Has .api)) }}yes{{ end }}
{{- end }}

{{- define "trivet.hasSnapshotter" -}}
{{ include "trivet.has" (dict "root" . "sidecar" "snapshotter" "api" "snapshot.storage.k8s.io/v1") }}
{{- end }}

{{- /* Image, resources and security of a sidecar: (dict "root" $ "sidecar" NAME). */ -}}
{{- define "trivet.sidecar" -}}
{{- $s := index .root.Values.sidecars .sidecar -}}
image: {{ $s.image.repository }}:{{ $s.image.tag }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- end }}

{{- define "trivet.sidecarEnd" -}}
{{- $s := index .root.Values.sidecars .sidecar -}}
resources:
  {{- toYaml ($s.resources | default .root.Values.sidecars.resources) | nindent 2 }}
securityContext:
  {{- include "trivet.unprivileged" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{- define "trivet.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* A reader of the API: what a sidecar does beside its calls to the driver. */ -}}
{{- define "trivet.election" -}}
- --leader-election
- --leader-election-namespace=$(NAMESPACE)
{{- end }}

{{- define "trivet.namespaceEnv" -}}
- name: NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
{{- end }}

{{- /* A role and its binding to the controller: (dict "root" $ "name" NAME "rules" RULES). */ -}}
{{- define "trivet.clusterRole" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ .name }}
  labels:
    {{- include "trivet.labels" .root | nindent 4 }}
rules:
  {{- .rules | trim | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ .name }}
  labels:
    {{- include "trivet.labels" .root | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: trivet-controller
    namespace: {{ .root.Release.Namespace }}
{{- end }}

{{- /* As trivet.sidecarEnd, for the node's pod, whose sockets are root's. */ -}}
{{- define "trivet.nodeSidecarEnd" -}}
{{- $s := index .root.Values.sidecars .sidecar -}}
resources:
  {{- toYaml ($s.resources | default .root.Values.sidecars.resources) | nindent 2 }}
securityContext:
  runAsUser: 0 # the sockets are root's
  {{- include "trivet.unprivileged" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{- /* More arguments of a sidecar: (list of strings). */ -}}
{{- define "trivet.args" -}}
{{- range . }}
- {{ . | quote }}
{{- end }}
{{- end }}
