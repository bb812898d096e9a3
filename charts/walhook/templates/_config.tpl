{{- define "walhook.databaseDir" -}}/run/secrets/walhook/database{{- end }}

{{- /* The configuration's section database, from the keys of a Secret, which are files. */}}
{{- define "walhook.databaseConfig" -}}
{{- $db := .Values.database }}
{{- $dir := include "walhook.databaseDir" . }}
{{- $section := dict }}
{{- if $db.urlKey }}
{{- $_ := set $section "url" (printf "${file:%s/%s}" $dir $db.urlKey) }}
{{- else }}
{{- $parts := list }}
{{- range $part := list "host" "port" "dbname" "user" }}
{{- $given := index $db $part | toString | replace `\` `\\` | replace `'` `\'` }}
{{- $parts = append $parts (printf "%s='%s'" $part ($given | default (printf "${file:%s/%s}" $dir (index $db.keys $part)))) }}
{{- end }}
{{- $_ := set $section "url" (join " " $parts) }}
{{- $_ := set $section "password" (printf "${file:%s/%s}" $dir $db.keys.password) }}
{{- end }}
{{- with $db.replicationUrlKey }}
{{- $_ := set $section "replication_url" (printf "${file:%s/%s}" $dir .) }}
{{- end }}
{{- toYaml $section }}
{{- end }}

{{- /* The whole configuration. */}}
{{- define "walhook.config" -}}
{{- $config := deepCopy .Values.config }}
{{- if .Values.database.existingSecret }}
{{- $_ := set $config "database" (include "walhook.databaseConfig" . | fromYaml) }}
{{- end }}
{{- $server := $config.server | default dict }}
{{- if not $server.listen }}
{{- $_ := set $server "listen" (printf ":%s" (include "walhook.port" .)) }}
{{- end }}
{{- $_ := set $config "server" $server }}
{{- toYaml $config }}
{{- end }}

{{- /* What of it is not taken up while running: pods are made anew when it changes. */}}
{{- define "walhook.checksum" -}}
{{- omit (include "walhook.config" . | fromYaml) "endpoints" "defaults" | toJson | sha256sum }}
{{- end }}

{{- /* The keys of the database's Secret that are mounted, so that a missing one is named by Kubernetes. */}}
{{- define "walhook.databaseItems" -}}
{{- $db := .Values.database }}
{{- $keys := list }}
{{- if $db.urlKey }}
{{- $keys = append $keys $db.urlKey }}
{{- else }}
{{- range $part := list "host" "port" "dbname" "user" }}
{{- if not (index $db $part | toString) }}
{{- $keys = append $keys (index $db.keys $part) }}
{{- end }}
{{- end }}
{{- $keys = append $keys $db.keys.password }}
{{- end }}
{{- if $db.replicationUrlKey }}
{{- $keys = append $keys $db.replicationUrlKey }}
{{- end }}
{{- range uniq $keys }}
- key: {{ . | quote }}
  path: {{ . | quote }}
{{- end }}
{{- end }}
