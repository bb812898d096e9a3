-- What the app does:
begin;
select pg_logical_emit_message(true, 'walhook', '{"id": "o-42-1", "type": "order.created", "key": "42", "data": {"id": 42, "total": 99.90}}');
select pg_logical_emit_message(true, 'walhook', '{"id": "o-42-2", "type": "order.shipped", "key": "42", "data": {"id": 42}}');
select pg_logical_emit_message(true, 'walhook', '{"id": "b-7-1", "type": "basket.left", "key": "7", "data": {"id": 7}}');
commit;
begin;
select pg_logical_emit_message(true, 'walhook', '{"id": "o-43-1", "type": "order.created", "key": "43", "data": {"id": 43}}');
rollback;
