-- What is known of a slot after it was lost. A checkpoint at 0/0 only announces that the slot's
-- first snapshot is to be taken.
alter table walhook.checkpoints
    add column if not exists proven_xmin numeric(20, 0), -- snap_xmin as of the last look that found publication and tables as they should be
    add column if not exists gap text,                   -- why committed rows may be missing from the stream; null: none are
    add column if not exists tables jsonb,               -- OIDs of the published tables by their quoted names
    add column if not exists hosts text,                 -- of the URL, as host:port,host:port
    add column if not exists server text;                -- the server's own address:port; its port where it is reached by a unix socket
