create table outboxevent (
  id            uuid primary key,
  aggregatetype varchar(255) not null,
  aggregateid   varchar(255) not null,
  type          varchar(255) not null,
  payload       jsonb
);

-- What the app does:
begin;
insert into outboxevent (id, aggregatetype, aggregateid, type, payload)
values ('a4b1ae63-1b5c-4fe0-8f3a-6f0a2c9f7d11', 'order', '42', 'OrderCreated', '{"id": 42, "total": 99.90}');
delete from outboxevent where id = 'a4b1ae63-1b5c-4fe0-8f3a-6f0a2c9f7d11';
commit;
insert into outboxevent (id, aggregatetype, aggregateid, type, payload)
values ('5d9d1b6c-93a5-4b1e-8d53-0f4c6b1f0a22', 'order', '42', 'OrderShipped', '{"id": 42}'),
       ('0f3c7f51-2a0e-4d0a-b1a5-5f8f6d4d7c33', 'basket', '7', 'BasketLeft', '{"id": 7}');
