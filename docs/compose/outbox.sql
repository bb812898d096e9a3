-- The app's outbox table, made when the database is.
create table outbox (
  id           uuid primary key default gen_random_uuid(),
  event_type   text not null,
  aggregate_id text,
  payload      jsonb not null,
  created_at   timestamptz not null default now()
);
