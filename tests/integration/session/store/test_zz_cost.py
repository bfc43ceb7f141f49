import time, statistics
from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.session.store.postgres import POOL_SETTINGS, PostgresStore
from tests.integration.session.store.kit import Kit, event
async def test_cost(fresh_database, postgres_url):
    pool = await open_pool(fresh_database, min_size=1, max_size=4, name="c", server_settings=POOL_SETTINGS)
    store = PostgresStore(pool)
    kit = Kit(store, await store.ensure_key("t", uuid7().hex*2, "x"), pool)
    async def round_(n=400):
        t=time.perf_counter()
        for _ in range(n):
            g = await kit.started("a", "hi")
            await kit.append(g, g.next_seq)
            await kit.finish(g, g.next_seq+1)
        return (time.perf_counter()-t)/n*1e6
    res={}
    await round_(200)
    for k in range(6):
        on = k%2==0
        for t in ("session","run","message","tool_call","idempotency"):
            await pool.execute(f"ALTER TABLE session.{t} {'ENABLE' if on else 'DISABLE'} TRIGGER refuse_while_moving")
        res.setdefault(on,[]).append(await round_())
    print("us for session+submit+claim+append+finish: with triggers", res[True], "without", res[False])
    await pool.close()
