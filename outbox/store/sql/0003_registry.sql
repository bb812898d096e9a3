-- The registry: endpoints that an app registers, with the settings of the file. Its changes come
-- through the replication stream, so that each takes effect between the rows around it; the old
-- row comes with them, because a value that an update leaves alone may not come again.
create table if not exists walhook.endpoints (
    id text collate "C" primary key default 'ep_' || replace(gen_random_uuid()::text, '-', '')
        check (id ~ '^[A-Za-z0-9_.-]{1,128}$'),
    url text not null,
    tenant text not null default '',
    events text[] not null default '{*}',
    filter text,
    -- Newest first. The default is 32 bytes, a digest of 46 random ones.
    secrets text[] not null default array['whsec_' || encode(sha256(
        uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64')],
    previous_secrets_until timestamptz, -- from then on the newest one alone signs; null: all of them do
    settings jsonb not null default '{}' check (jsonb_typeof(settings) = 'object'),
    status text not null default 'enabled' check (status in ('enabled', 'paused', 'disabled', 'invalid')),
    status_reason text not null default '',
    description text not null default '',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
alter table walhook.endpoints replica identity full;

-- The rows of walhook.endpoints as the stream brought them: what was registered as of a position,
-- so that a stream that is read again finds each endpoint as it was there. A row is there before
-- the slot moves past its position, and until the slot has moved past a newer one.
create table if not exists walhook.endpoint_versions (
    slot text collate "C" not null,
    endpoint_id text collate "C" not null,
    commit_lsn pg_lsn not null,
    ordinal bigint not null,
    content json,                     -- null: it was removed
    primary key (slot, endpoint_id, commit_lsn, ordinal)
);

alter table walhook.checkpoints
    add column if not exists registry boolean not null default false; -- endpoint_versions is complete as of this checkpoint
