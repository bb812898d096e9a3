{{- /* What neither the schema nor Kubernetes would say in plain words. */}}
{{- define "walhook.validate" -}}
{{- $v := .Values }}
{{- $db := $v.database }}
{{- if and $v.existingConfigMap $v.config }}
{{- fail "existingConfigMap and config: give one of them" }}
{{- end }}
{{- range $part := list "host" "port" "dbname" "user" }}
{{- if and (index $db $part | toString) $db.urlKey $db.existingSecret }}
{{- fail (printf "database.%s: the key %s of the Secret is a whole URL; set database.urlKey to \"\" to give its parts" $part $db.urlKey) }}
{{- end }}
{{- end }}
{{- if not $db.existingSecret }}
{{- range $part := list "host" "port" "dbname" "user" "replicationUrlKey" }}
{{- if index $db $part | toString }}
{{- fail (printf "database.%s: it goes with database.existingSecret" $part) }}
{{- end }}
{{- end }}
{{- end }}
{{- $seen := dict }}
{{- range $v.secrets }}
{{- if hasKey $seen .name }}
{{- fail (printf "secrets: %s is there twice" .name) }}
{{- end }}
{{- if has .name (list "database" "database-ca") }}
{{- fail (printf "secrets: a Secret named %s would be mounted over the database's; give it another name, or use extraVolumes" .name) }}
{{- end }}
{{- $_ := set $seen .name true }}
{{- end }}
{{- if not $v.existingConfigMap }}
{{- include "walhook.validateConfig" . }}
{{- end }}
{{- if and $db.ca.existingSecret $db.ca.existingConfigMap }}
{{- fail "database.ca: give existingSecret or existingConfigMap" }}
{{- end }}
{{- if eq $v.mode "sidecar" }}
{{- if and (or $v.podMonitor.enabled $v.networkPolicy.enabled) (not $v.sidecar.podLabels) }}
{{- fail "sidecar.podLabels: name labels of the app's pods, which the PodMonitor and the NetworkPolicy go by" }}
{{- end }}
{{- if $v.serviceMonitor.enabled }}
{{- fail "serviceMonitor.enabled: a sidecar has no Service; use podMonitor" }}
{{- end }}
{{- if ne (int $v.replicaCount) 2 }}
{{- fail "replicaCount: a sidecar has as many pods as the app; leave it out" }}
{{- end }}
{{- end }}
{{- if and $v.serviceMonitor.enabled (not $v.service.enabled) }}
{{- fail "serviceMonitor.enabled: it needs service.enabled; or use podMonitor" }}
{{- end }}
{{- $pdb := $v.podDisruptionBudget }}
{{- if and $pdb.enabled (not (toString $pdb.minAvailable)) (not (toString $pdb.maxUnavailable)) }}
{{- fail "podDisruptionBudget: give maxUnavailable or minAvailable, or set enabled to false" }}
{{- end }}
{{- if $v.prometheusRule.disabled }}
{{- $alerts := list }}
{{- range include "walhook.alerts" . | fromYamlArray }}
{{- $alerts = append $alerts .alert }}
{{- end }}
{{- range $v.prometheusRule.disabled }}
{{- if not (has . (append $alerts "WalhookStandbyMissing")) }}
{{- fail (printf "prometheusRule.disabled: there is no alert %s; there are %s" . (join ", " $alerts)) }}
{{- end }}
{{- end }}
{{- end }}
{{- if eq $v.checkSecrets "refuse" }}
{{- with include "walhook.missing" . | trim }}
{{- fail (printf "\n%s\n(where it is made later: checkSecrets: warn)" .) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Mistakes in the configuration that walhook would end with, in a crash loop. */}}
{{- define "walhook.validateConfig" -}}
{{- $v := .Values }}
{{- if not $v.config.outbox }}
{{- fail "config.outbox: name the app's outbox table, as in config.outbox: [{table: public.outbox}]; or give existingConfigMap" }}
{{- end }}
{{- range $i, $source := $v.config.outbox }}
{{- if eq (hasKey $source "table") (hasKey $source "messages") }}
{{- fail (printf "config.outbox[%d]: give one of table and messages" $i) }}
{{- end }}
{{- end }}
{{- if and $v.database.existingSecret $v.config.database }}
{{- fail "database.existingSecret and config.database: give one of them" }}
{{- end }}
{{- if not (or $v.database.existingSecret (dig "database" "url" "" $v.config)) }}
{{- fail "database.existingSecret: name the Secret that says where Postgres is, as CloudNativePG's <cluster>-app; or give config.database.url" }}
{{- end }}
{{- $defaults := $v.config.defaults | default dict }}
{{- $ids := dict }}
{{- range $i, $endpoint := $v.config.endpoints }}
{{- with $endpoint.id }}
{{- if hasKey $ids . }}
{{- fail (printf "config.endpoints[%d].id: %s is the id of endpoints[%d], too" $i . (index $ids .)) }}
{{- end }}
{{- $_ := set $ids . $i }}
{{- end }}
{{- $signing := hasKey $endpoint "signing" | ternary $endpoint.signing ($defaults.signing | default "standard") }}
{{- $schemes := kindIs "slice" $signing | ternary $signing (list $signing) }}
{{- $secrets := hasKey $endpoint "secrets" | ternary $endpoint.secrets $defaults.secrets }}
{{- if has "standard" $schemes }}
{{- range $j, $secret := $secrets }}
{{- if not (regexMatch `^whsec_|^whsk_|\$\{` $secret) }}
{{- fail (printf "config.endpoints[%d].secrets[%d]: signing standard takes those that begin with whsec_ or whsk_" $i $j) }}
{{- end }}
{{- end }}
{{- end }}
{{- if not $secrets }}
{{- range without $schemes "standard" "none" }}
{{- if not (and (kindIs "string" .) (contains "${" .)) }}
{{- fail (printf "config.endpoints[%d].secrets: signing %s needs one" $i (kindIs "string" . | ternary . "of your own")) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- with dig "server" "listen" "" $v.config }}
{{- if not (regexMatch `^(0\.0\.0\.0|\[::\])?:[0-9]+$` .) }}
{{- fail (printf "config.server.listen: probes and Prometheus ask from outside of the pod; give \":%s\"" (regexFind "[0-9]+$" .)) }}
{{- end }}
{{- end }}
{{- $text := include "walhook.config" . | replace "$${" "" }}
{{- $env := list "WALHOOK_CONFIG" "HOSTNAME" "HOME" "PATH" "PGSSLMODE" "PGSSLROOTCERT" }}
{{- range $v.extraEnv }}
{{- $env = append $env .name }}
{{- end }}
{{- range regexFindAll `\$\{[A-Za-z_][A-Za-z0-9_]*\}` $text -1 | uniq }}
{{- $name := trimPrefix "${" . | trimSuffix "}" }}
{{- if not (or $v.extraEnvFrom (has $name $env) (regexMatch `_(HOST|PORT)$|_PORT_` $name)) }}
{{- fail (printf "config: it refers to %s, which extraEnv does not have" .) }}
{{- end }}
{{- end }}
{{- range regexFindAll `\$\{file:[^}]*\}` $text -1 | uniq }}
{{- $path := trimPrefix "${file:" . | trimSuffix "}" }}
{{- if not (hasPrefix "/" $path) }}
{{- fail (printf "config: %s wants an absolute path" .) }}
{{- end }}
{{- if hasPrefix "/run/secrets/walhook/" $path }}
{{- $name := trimPrefix "/run/secrets/walhook/" $path | splitList "/" | first }}
{{- $mounted := list }}
{{- if $v.database.existingSecret }}{{ $mounted = append $mounted "database" }}{{ end }}
{{- if or $v.database.ca.existingSecret $v.database.ca.existingConfigMap }}{{ $mounted = append $mounted "database-ca" }}{{ end }}
{{- range $v.secrets }}{{ $mounted = append $mounted .name }}{{ end }}
{{- range $v.extraVolumeMounts }}
{{- if hasPrefix .mountPath $path }}{{ $mounted = append $mounted $name }}{{ end }}
{{- end }}
{{- if not (has $name $mounted) }}
{{- fail (printf "config: it refers to %s; put {name: %s} into secrets" . $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Lines about Secrets, ConfigMaps and keys that the cluster lacks; none where Helm sees no cluster. */}}
{{- define "walhook.missing" -}}
{{- $v := .Values }}
{{- $ns := .Release.Namespace }}
{{- $db := $v.database }}
{{- if lookup "v1" "ConfigMap" $ns "kube-root-ca.crt" }}
{{- $wanted := list }}
{{- if $db.existingSecret }}
{{- range include "walhook.databaseItems" . | fromYamlArray }}
{{- $wanted = append $wanted (dict "of" "database.existingSecret" "kind" "Secret" "name" $db.existingSecret "key" .key) }}
{{- end }}
{{- end }}
{{- with $db.ca.existingSecret }}
{{- $wanted = append $wanted (dict "of" "database.ca.existingSecret" "kind" "Secret" "name" . "key" $db.ca.key) }}
{{- end }}
{{- with $db.ca.existingConfigMap }}
{{- $wanted = append $wanted (dict "of" "database.ca.existingConfigMap" "kind" "ConfigMap" "name" . "key" $db.ca.key) }}
{{- end }}
{{- with $v.existingConfigMap }}
{{- $wanted = append $wanted (dict "of" "existingConfigMap" "kind" "ConfigMap" "name" . "key" $v.existingConfigMapKey) }}
{{- end }}
{{- $text := "" }}
{{- if not $v.existingConfigMap }}
{{- $text = include "walhook.config" . }}
{{- end }}
{{- range $i, $secret := $v.secrets }}
{{- if not $secret.optional }}
{{- $wanted = append $wanted (dict "of" (printf "secrets[%d]" $i) "kind" "Secret" "name" $secret.name "key" "") }}
{{- range regexFindAll (printf `\$\{file:/run/secrets/walhook/%s/[^}]*\}` (replace "." `\.` $secret.name)) $text -1 | uniq }}
{{- $key := trimPrefix (printf "${file:/run/secrets/walhook/%s/" $secret.name) . | trimSuffix "}" }}
{{- $wanted = append $wanted (dict "of" "config" "kind" "Secret" "name" $secret.name "key" $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $i, $env := $v.extraEnv }}
{{- range $kind, $from := dict "Secret" (dig "valueFrom" "secretKeyRef" dict $env) "ConfigMap" (dig "valueFrom" "configMapKeyRef" dict $env) }}
{{- if and $from.name (not $from.optional) }}
{{- $wanted = append $wanted (dict "of" (printf "extraEnv[%d]" $i) "kind" $kind "name" $from.name "key" $from.key) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $i, $env := $v.extraEnvFrom }}
{{- range $kind, $from := dict "Secret" ($env.secretRef | default dict) "ConfigMap" ($env.configMapRef | default dict) }}
{{- if and $from.name (not $from.optional) }}
{{- $wanted = append $wanted (dict "of" (printf "extraEnvFrom[%d]" $i) "kind" $kind "name" $from.name "key" "") }}
{{- end }}
{{- end }}
{{- end }}
{{- $own := dict }}
{{- range $v.extraObjects }}
{{- $object := tpl (kindIs "string" . | ternary . (toYaml .)) $ | fromYaml }}
{{- $_ := set $own (printf "%s %s" $object.kind (dig "metadata" "name" "" $object)) true }}
{{- end }}
{{- $lines := list }}
{{- range $wanted }}
{{- $what := printf "%s %s" .kind .name }}
{{- if not (hasKey $own $what) }}
{{- $found := lookup "v1" .kind $ns .name }}
{{- if not $found }}
{{- $lines = append $lines (printf "%s: there is no %s in namespace %s" .of $what $ns) }}
{{- else if .key }}
{{- $keys := concat (keys ($found.data | default dict)) (keys ($found.binaryData | default dict)) | sortAlpha }}
{{- if not (has .key $keys) }}
{{- $lines = append $lines (printf "%s: %s in namespace %s has no key %s; it has %s" .of $what $ns .key (join ", " $keys | default "none")) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- join "\n" (uniq $lines) }}
{{- end }}
{{- end }}
