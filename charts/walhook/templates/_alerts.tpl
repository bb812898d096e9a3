{{- /*
The alerts, as YAML. Every one has its section in docs/alerts.md, and the tests hold both together, and the series to those
that walhook has.
*/}}
{{- define "walhook.alerts" -}}
{{- $t := .Values.prometheusRule.thresholds }}
{{- $only := .Values.prometheusRule.selector | default (printf `namespace="%s", job=~"(.+/)?%s"` .Release.Namespace (include "walhook.fullname" .)) }}
{{- $all := printf "{%s}" $only -}}
- alert: WalhookAbsent
  expr: |-
    absent(walhook_stream_state{{ $all }})
  for: 10m
  labels:
    severity: critical
  annotations:
    summary: >-
      No walhook answers.
    description: >-
      No pod of walhook was asked for its metrics for 10 minutes: events wait in the WAL, which the slot keeps. Look at the pods (kubectl get pods, describe, logs --previous), then at the ServiceMonitor or PodMonitor.
- alert: WalhookNotStreaming
  expr: |-
    sum by (namespace, job) (walhook_stream_state{state="streaming", {{ $only }}}) == 0
  for: 5m
  labels:
    severity: critical
  annotations:
    summary: >-
      No instance of walhook streams.
    description: >-
      Nothing is sent, and the slot keeps WAL. /readyz and the log of each pod say why and what mends it; `walhook check` says the same from outside.
- alert: WalhookSlotLost
  expr: |-
    max by (namespace, job) (walhook_stream_state{state="lost", {{ $only }}}) == 1
    or
    max by (namespace, job) (walhook_slot_wal_status{status="lost", {{ $only }}}) == 1
  for: 0m
  labels:
    severity: critical
  annotations:
    summary: >-
      The slot is lost: events may have been missed.
    description: >-
      The slot was dropped, invalidated or moved by somebody else. The log says how many rows would be sent again; `walhook run --recover` sends them (extraArgs: [--recover] for one upgrade of the chart). Keep the rows of the outbox until then.
- alert: WalhookSlotUnreserved
  expr: |-
    max by (namespace, job) (walhook_slot_wal_status{status="unreserved", {{ $only }}}) == 1
  for: 1m
  labels:
    severity: critical
  annotations:
    summary: >-
      The slot is about to be lost.
    description: >-
      The slot is behind by more than max_slot_wal_keep_size, and the next checkpoint of Postgres may take its WAL. Raise max_slot_wal_keep_size now (alter system …; select pg_reload_conf()), then look at why walhook is behind.
- alert: WalhookWatermarkStuck
  expr: |-
    max by (namespace, job) (walhook_watermark_stuck_seconds{{ $all }}) > 60
  for: 2m
  labels:
    severity: critical
  annotations:
    summary: >-
      The watermark has not moved for more than a minute.
    description: >-
      A delivery can neither be sent nor parked, or the checkpoint cannot be written, so the slot keeps all WAL from there. The schema walhook cannot be written: the database is read-only, its disk is full, a lock is held, or a right is missing. /readyz and the log say which.
- alert: WalhookRetainedWALShare
  expr: |-
    max by (namespace, job) (walhook_slot_retained_bytes{{ $all }})
      / (max by (namespace, job) (walhook_slot_keep_limit_bytes{{ $all }}) > 0) > {{ $t.retainedShare }}
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: >-
      The slot keeps {{`{{ $value | humanizePercentage }}`}} of what max_slot_wal_keep_size allows.
    description: >-
      Beyond it the slot is lost. A transaction that is open for long holds it (select pid, xact_start, query from pg_stat_activity order by xact_start), a standby in synchronized_standby_slots is down, or walhook does not keep up: look at walhook_watermark_lag_bytes.
- alert: WalhookRetainedWAL
  expr: |-
    max by (namespace, job) (walhook_slot_retained_bytes{{ $all }}) > {{ int64 $t.retainedBytes }}
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: >-
      The slot keeps {{`{{ $value | humanize1024 }}`}}B of WAL.
    description: >-
      It fills the disk of Postgres. As for WalhookRetainedWALShare; set max_slot_wal_keep_size to less than the free space of the disk, so that at worst the slot is lost and not the database.
{{- if and (eq .Values.mode "deployment") (gt (int .Values.replicaCount) 1) }}
- alert: WalhookStandbyMissing
  expr: |-
    sum by (namespace, job) (walhook_stream_state{state="standby", {{ $only }}}) < {{ sub (int .Values.replicaCount) 1 }}
  for: 15m
  labels:
    severity: warning
  annotations:
    summary: >-
      An instance that should stand by does not.
    description: >-
      If the active one ends now, events wait until a pod is there again. Look at the pods (pending, crashing), and at the /readyz of those that run.
{{- end }}
- alert: WalhookBreakerOpen
  expr: |-
    max by (namespace, job, endpoint) (walhook_breaker_state{{ $all }}) >= 1
  for: {{ $t.breakerOpenFor }}
  labels:
    severity: warning
  annotations:
    summary: >-
      Endpoint {{`{{ $labels.endpoint }}`}} has been failing for {{ $t.breakerOpenFor }}.
    description: >-
      Its deliveries are parked and wait; nothing is lost, and no other endpoint is held up. `walhook deliveries list --endpoint ID` has the last answer, `walhook endpoints test ID` tries it. After disable_after (5 days) of failure it is disabled.
- alert: WalhookParkedGrowing
  expr: |-
    max by (namespace, job, endpoint) (walhook_parked{{ $all }}) > {{ int64 $t.parked }}
    and
    max by (namespace, job, endpoint) (delta(walhook_parked{{ $all }}[1h])) > 0
  for: 30m
  labels:
    severity: warning
  annotations:
    summary: >-
      {{`{{ $value }}`}} deliveries wait for endpoint {{`{{ $labels.endpoint }}`}}, and they become more.
    description: >-
      The endpoint is slower than events come, or fails. Compare walhook_attempts_total by code: where answers are 2xx, raise concurrency or rate_limit, or use batch; where not, see WalhookBreakerOpen.
- alert: WalhookOldestParked
  expr: |-
    max by (namespace, job, endpoint) (walhook_oldest_parked_seconds{{ $all }}) > {{ $t.oldestParkedSeconds }}
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: >-
      A delivery has been parked for endpoint {{`{{ $labels.endpoint }}`}} for {{`{{ $value | humanizeDuration }}`}}.
    description: >-
      Its receiver is that late. Where the breaker is open, see WalhookBreakerOpen; where it is closed, the endpoint is slower than events come, or refuses this one event: `walhook deliveries list --endpoint ID` has its last answer and its next attempt.
- alert: WalhookDeadDeliveries
  expr: |-
    sum by (namespace, job, endpoint) (increase(walhook_deliveries_total{outcome="dead", {{ $only }}}[1h])) > 0
  for: 0m
  labels:
    severity: warning
  annotations:
    summary: >-
      Deliveries for endpoint {{`{{ $labels.endpoint }}`}} died within the last hour.
    description: >-
      They are not tried again by themselves. `walhook deliveries list --state dead --endpoint ID` says why; mend that, then `walhook deliveries retry`, or discard them.
- alert: WalhookUnmappableRows
  expr: |-
    sum by (namespace, job) (increase(walhook_events_total{outcome="unmappable", {{ $only }}}[1h])) > 0
  for: 0m
  labels:
    severity: warning
  annotations:
    summary: >-
      Rows of the outbox could not be read as events.
    description: >-
      Each is a dead delivery with the reason: `walhook deliveries list --state dead`. Most often the app writes a payload that is no JSON, or leaves the type out.
- alert: WalhookDeliverySlow
  expr: |-
    histogram_quantile(0.9, sum by (namespace, job, le) (rate(walhook_commit_to_delivery_seconds_bucket{{ $all }}[10m]))) > {{ $t.deliverySeconds }}
    or
    histogram_quantile(0.9, sum by (namespace, job) (rate(walhook_commit_to_delivery_seconds{{ $all }}[10m]))) > {{ $t.deliverySeconds }}
  for: 15m
  labels:
    severity: warning
  annotations:
    summary: >-
      A tenth of the deliveries takes longer than {{`{{ $value | humanizeDuration }}`}} from commit to 2xx.
    description: >-
      While an endpoint recovers from an outage this is what is expected: what was parked counts. Otherwise look at walhook_attempt_duration_seconds (slow receivers), walhook_watermark_lag_bytes (a backlog) and the CPU of the pod.
- alert: WalhookConfigReloadFailed
  expr: |-
    max by (namespace, job) (walhook_config_reload_failed{{ $all }}) == 1
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: >-
      The configuration is broken, and an older one is in force.
    description: >-
      What was changed last is not in force, and the next start fails. The log names file, line and key; `walhook check` too.
- alert: WalhookClockOff
  expr: |-
    max by (namespace, job) (abs(walhook_clock_ahead_seconds{{ $all }})) > 60
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: >-
      The clocks of Postgres and walhook are more than a minute apart.
    description: >-
      Receivers refuse signatures whose time is 5 minutes off, and beyond 4 minutes walhook is not ready. Look at the time synchronisation of both nodes.
- alert: WalhookShortages
  expr: |-
    sum by (namespace, job) (increase(walhook_shortages_total{{ $all }}[15m])) > 0
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: >-
      Attempts are put off because the node lacks descriptors, ports or memory.
    description: >-
      Raise the limit of open files, or lower the concurrency of endpoints. No attempt is spent by this and nothing is lost.
{{- end }}
