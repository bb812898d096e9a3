{{- /* What every container that runs walhook has. */}}
{{- define "walhook.base" -}}
image: {{ include "walhook.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
# A mistake that ends it is told by kubectl describe pod.
terminationMessagePolicy: FallbackToLogsOnError
env:
  - name: WALHOOK_CONFIG
    value: /etc/walhook/{{ if .Values.existingConfigMap }}{{ .Values.existingConfigMapKey }}{{ else }}walhook.yaml{{ end }}
  {{- with .Values.database.sslMode }}
  - name: PGSSLMODE
    value: {{ . | quote }}
  {{- end }}
  {{- if or .Values.database.ca.existingSecret .Values.database.ca.existingConfigMap }}
  - name: PGSSLROOTCERT
    value: /run/secrets/walhook/database-ca/{{ .Values.database.ca.key }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "walhook.securityContext" (list . .Values.securityContext) | nindent 2 }}
{{- with .Values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - name: walhook-config
    mountPath: /etc/walhook
    readOnly: true
  {{- if .Values.database.existingSecret }}
  - name: walhook-database
    mountPath: {{ include "walhook.databaseDir" . }}
    readOnly: true
  {{- end }}
  {{- if or .Values.database.ca.existingSecret .Values.database.ca.existingConfigMap }}
  - name: walhook-database-ca
    mountPath: /run/secrets/walhook/database-ca
    readOnly: true
  {{- end }}
  {{- range $i, $secret := .Values.secrets }}
  - name: walhook-secret-{{ $i }}
    mountPath: /run/secrets/walhook/{{ $secret.name }}
    readOnly: true
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* The container that runs for good, but for its name. */}}
{{- define "walhook.container" -}}
{{- $root := index . 0 }}
{{- $readiness := index . 1 }}
{{- include "walhook.base" $root }}
args:
  - run
  {{- with $root.Values.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - name: {{ if eq $root.Values.mode "sidecar" }}walhook{{ else }}http{{ end }}
    containerPort: {{ include "walhook.port" $root }}
    protocol: TCP
{{- range $name := list "startupProbe" "livenessProbe" "readinessProbe" }}
{{- $probe := index $root.Values $name }}
{{- if and $probe (or $readiness (ne $name "readinessProbe")) }}
{{- $probe = deepCopy $probe }}
{{- if and (eq $root.Values.mode "sidecar") $probe.httpGet (eq (toString $probe.httpGet.port) "http") }}
{{- $_ := set $probe.httpGet "port" "walhook" }}
{{- end }}
{{ $name }}:
  {{- toYaml $probe | nindent 2 }}
{{- end }}
{{- end }}
{{- with $root.Values.lifecycle }}
lifecycle:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* The volumes of a pod: (list root name-of-the-ConfigMap). */}}
{{- define "walhook.podVolumes" -}}
{{- $root := index . 0 }}
{{- $v := $root.Values -}}
- name: walhook-config
  configMap:
    name: {{ index . 1 }}
{{- if $v.database.existingSecret }}
- name: walhook-database
  secret:
    secretName: {{ $v.database.existingSecret }}
    items:
      {{- include "walhook.databaseItems" $root | trim | nindent 6 }}
{{- end }}
{{- with $v.database.ca }}
{{- if .existingSecret }}
- name: walhook-database-ca
  secret:
    secretName: {{ .existingSecret }}
    items:
      - key: {{ .key | quote }}
        path: {{ .key | quote }}
{{- else if .existingConfigMap }}
- name: walhook-database-ca
  configMap:
    name: {{ .existingConfigMap }}
    items:
      - key: {{ .key | quote }}
        path: {{ .key | quote }}
{{- end }}
{{- end }}
{{- range $i, $secret := $v.secrets }}
- name: walhook-secret-{{ $i }}
  secret:
    secretName: {{ $secret.name }}
    {{- if $secret.optional }}
    optional: true
    {{- end }}
{{- end }}
{{- with $v.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "walhook.configMapName" -}}
{{- .Values.existingConfigMap | default (include "walhook.fullname" .) }}
{{- end }}

{{- /*
For the chart of an app that has this one as a dependency:

    initContainers:
      {{- include "walhook.sidecar" . | nindent 8 }}
    volumes:
      {{- include "walhook.sidecarVolumes" . | nindent 8 }}
    metadata.annotations:
      {{- include "walhook.sidecarAnnotations" . | nindent 8 }}

The dot is the app's, or .Subcharts.NAME where the dependency has an alias.
*/}}
{{- define "walhook.sidecar" -}}
{{- $root := . }}
{{- if hasKey .Subcharts "walhook" }}
{{- $root = .Subcharts.walhook }}
{{- end }}
{{- if ne $root.Values.mode "sidecar" }}
{{- fail "walhook.sidecar: set walhook.mode to sidecar, or the Deployment runs too" }}
{{- end -}}
- name: walhook
  restartPolicy: Always
  {{- include "walhook.container" (list $root $root.Values.sidecar.readinessProbe) | nindent 2 }}
{{- end }}

{{- define "walhook.sidecarVolumes" -}}
{{- $root := . }}
{{- if hasKey .Subcharts "walhook" }}
{{- $root = .Subcharts.walhook }}
{{- end }}
{{- include "walhook.podVolumes" (list $root (include "walhook.configMapName" $root)) }}
{{- end }}

{{- define "walhook.sidecarAnnotations" -}}
{{- $root := . }}
{{- if hasKey .Subcharts "walhook" }}
{{- $root = .Subcharts.walhook }}
{{- end }}
{{- if $root.Values.existingConfigMap -}}
checksum/walhook: none
{{- else -}}
checksum/walhook: {{ include "walhook.checksum" $root }}
{{- end }}
{{- end }}

{{- /* A pod's settings that the Deployment, the test and the Job share. */}}
{{- define "walhook.podSettings" -}}
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "walhook.securityContext" (list . .Values.podSecurityContext) | nindent 2 }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
