{{- define "walhook.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "walhook.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- $name := include "walhook.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "walhook.selectorLabels" -}}
app.kubernetes.io/name: {{ include "walhook.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "walhook.labels" -}}
{{ include "walhook.selectorLabels" . }}
{{ include "walhook.otherLabels" . }}
{{- end }}

{{- /* Of pods that are not the Deployment's, lest its selector take them: (list root part). */}}
{{- define "walhook.partLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ printf "%s-%s" (include "walhook.name" $root) (index . 1) | trunc 63 }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{ include "walhook.otherLabels" $root }}
{{- end }}

{{- define "walhook.otherLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "walhook.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "walhook.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "walhook.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- /* The port that the pods serve on. */}}
{{- define "walhook.port" -}}
{{- $listen := "" }}
{{- if not .Values.existingConfigMap }}
{{- $listen = dig "server" "listen" "" .Values.config | toString }}
{{- end }}
{{- regexFind "[0-9]+$" $listen | default (toString .Values.containerPort) }}
{{- end }}

{{- /* A security context, without what OpenShift chooses itself. */}}
{{- define "walhook.securityContext" -}}
{{- $root := index . 0 }}
{{- $context := index . 1 }}
{{- $openshift := toString $root.Values.openshift }}
{{- if eq $openshift "auto" }}
{{- $openshift = $root.Capabilities.APIVersions.Has "security.openshift.io/v1" | toString }}
{{- end }}
{{- if eq $openshift "true" }}
{{- $context = omit $context "runAsUser" "runAsGroup" "fsGroup" }}
{{- end }}
{{- toYaml $context }}
{{- end }}

{{- /* What neither the schema nor Kubernetes would say in plain words. */}}
{{- define "walhook.validate" -}}
{{- $v := .Values }}
{{- if and $v.existingConfigMap $v.config }}
{{- fail "existingConfigMap and config: give one of them" }}
{{- end }}
{{- if not $v.existingConfigMap }}
{{- if not $v.config.outbox }}
{{- fail "config.outbox: name the app's outbox table, as in config.outbox: [{table: public.outbox}]; or give existingConfigMap" }}
{{- end }}
{{- if and $v.database.existingSecret $v.config.database }}
{{- fail "database.existingSecret and config.database: give one of them" }}
{{- end }}
{{- if not (or $v.database.existingSecret (dig "database" "url" "" $v.config)) }}
{{- fail "database.existingSecret: name the Secret that says where Postgres is, as CloudNativePG's <cluster>-app; or give config.database.url" }}
{{- end }}
{{- end }}
{{- if and $v.database.ca.existingSecret $v.database.ca.existingConfigMap }}
{{- fail "database.ca: give existingSecret or existingConfigMap" }}
{{- end }}
{{- if and (eq $v.mode "sidecar") (or $v.podMonitor.enabled $v.networkPolicy.enabled) (not $v.sidecar.podLabels) }}
{{- fail "sidecar.podLabels: name labels of the app's pods, which the PodMonitor and the NetworkPolicy go by" }}
{{- end }}
{{- if and (eq $v.mode "sidecar") $v.serviceMonitor.enabled }}
{{- fail "serviceMonitor.enabled: a sidecar has no Service; use podMonitor" }}
{{- end }}
{{- if and $v.serviceMonitor.enabled (not $v.service.enabled) }}
{{- fail "serviceMonitor.enabled: it needs service.enabled; or use podMonitor" }}
{{- end }}
{{- $seen := dict }}
{{- range $v.secrets }}
{{- if hasKey $seen .name }}
{{- fail (printf "secrets: %s is there twice" .name) }}
{{- end }}
{{- $_ := set $seen .name true }}
{{- end }}
{{- end }}
