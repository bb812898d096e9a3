create table watermill_events (
  "offset"         bigserial,
  "uuid"           varchar(36) not null,
  "created_at"     timestamp not null default current_timestamp,
  "payload"        json default null,
  "metadata"       json default null,
  "transaction_id" xid8 not null,
  primary key ("transaction_id", "offset")
);

-- What the app does:
insert into watermill_events (uuid, payload, metadata, transaction_id)
values ('a4b1ae63-1b5c-4fe0-8f3a-6f0a2c9f7d11', '{"id": 42, "total": 99.90}',
        '{"name": "order.created", "partition_key": "42", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}', pg_current_xact_id()),
       ('5d9d1b6c-93a5-4b1e-8d53-0f4c6b1f0a22', '{"id": 42}', '{"name": "order.shipped", "partition_key": "42"}', pg_current_xact_id()),
       ('0f3c7f51-2a0e-4d0a-b1a5-5f8f6d4d7c33', '{"id": 7}', '{"name": "basket.left"}', pg_current_xact_id());
