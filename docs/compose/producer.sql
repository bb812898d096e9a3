-- What an app does: a row in its outbox, here once a second.
insert into outbox (event_type, aggregate_id, payload)
select 'order.placed', 'order-' || n, jsonb_build_object('order', n, 'amount', 120.50)
from (select (random() * 1000)::int as n) as orders
\watch 1
