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
