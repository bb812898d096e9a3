-- The outbox table of the examples that have none of their own. Its columns are found by their names.
create table outbox (
  id           uuid primary key default gen_random_uuid(),
  event_type   text not null,
  aggregate_id text,                 -- the key: its events stay in order
  payload      jsonb not null,
  created_at   timestamptz not null default now()
);
