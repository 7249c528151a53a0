"""The catalog over both Redis we test with: OpenAI's listings and counts, generations, tenants, atomic changes."""

import asyncio
from dataclasses import replace

import pytest

from actors.errors import InvalidRequest, NotFound
from actors.policies.chunking import Chunking
from actors.policies.ingestion import KIND
from actors.stores.catalog import Catalog
from actors.stores.catalog_keys import scope
from actors.stores.catalog_records import Attachment, FileRecord, LastError, PageQuery
from actors.stores.catalog_stores import StoreSettings
from actors.stores.jobs import JobLog

T = "acme"


@pytest.fixture
def catalog(redis):
    return Catalog(redis)


@pytest.fixture
def jobs(redis):
    return JobLog(redis)


async def add_file(catalog, name="a.txt", purpose="assistants"):
    file = FileRecord(
        id=catalog.files.new_id(), filename=name, bytes=3, purpose=purpose, created_at=0, sha256="x"
    )
    return await catalog.files.add(T, file)


async def attach(catalog, jobs, store, *files, **how):
    wanted = [(file, Attachment(file_id=file.id, **how)) for file in files]
    return await catalog.store_files.attach(T, store.id, wanted, jobs)


async def published(catalog, jobs, store, usage=10):
    file = await add_file(catalog)
    [record] = await attach(catalog, jobs, store, file)
    assert await catalog.store_files.publish(record, T, "v1", usage)
    return file


async def tasks(jobs):
    leases = (await jobs.lease(KIND, "test", 100)).leases
    for lease in leases:
        await jobs.done(lease)
    return [lease.payload for lease in leases]


# --- files and stores --------------------------------------------------------------------------------


async def test_files_are_listed_newest_first_by_purpose_and_page(catalog):
    files = [await add_file(catalog, name=f"{n}.txt") for n in range(5)]
    batch = await add_file(catalog, purpose="batch")
    newest_first = [batch, *files[::-1]]
    page = await catalog.files.page(T, PageQuery(limit=4))
    assert (page.items, page.has_more) == (newest_first[:4], True)
    page = await catalog.files.page(T, PageQuery(limit=4, after=page.items[-1].id))
    assert (page.items, page.has_more) == (newest_first[4:], False)
    page = await catalog.files.page(T, PageQuery(limit=2, before=files[0].id))
    assert (page.items, page.has_more) == ([files[2], files[1]], True)
    page = await catalog.files.page(T, PageQuery(order="asc", after=files[3].id), purpose="assistants")
    assert page.items == [files[4]]
    assert files[0].created_at > 1_600_000_000


async def test_a_caller_may_delete_what_it_lists_and_page_on(catalog, jobs):
    files = [await add_file(catalog) for _ in range(5)]
    seen, after = [], None
    while True:
        page = await catalog.files.page(T, PageQuery(limit=2, order="asc", after=after))
        for file in page.items:
            await catalog.delete_file(T, file.id, jobs)
        seen += page.items
        if not page.has_more:
            break
        after = page.items[-1].id
    assert seen == files
    assert (await catalog.files.page(T, PageQuery())).items == []


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 101}, {"order": "up"}])
def test_a_page_out_of_bounds_is_refused(wrong):
    with pytest.raises(InvalidRequest):
        PageQuery(**wrong)


async def test_a_cursor_that_names_nothing_is_refused(catalog):
    with pytest.raises(InvalidRequest, match="after"):
        await catalog.files.page(T, PageQuery(after="file-none"))


async def test_a_store_keeps_its_settings_and_changes_only_what_is_asked(catalog):
    store = await catalog.stores.create(T, StoreSettings(name="docs", metadata={"team": "x"}))
    assert (store.name, store.generation, store.counts.total, store.expired) == ("docs", 0, 0, False)
    changed = await catalog.stores.update(T, store.id, {"expires_after_days": 7})
    assert (changed.name, changed.metadata, changed.expires_after_days) == ("docs", {"team": "x"}, 7)
    assert changed.expires_at == changed.last_active_at + 7 * 86_400
    assert [one.id for one in (await catalog.stores.page(T, PageQuery())).items] == [store.id]


@pytest.mark.parametrize(
    "settings",
    [
        {"metadata": {str(n): "v" for n in range(17)}},
        {"metadata": {"k" * 65: "v"}},
        {"metadata": {"k": "v" * 513}},
        {"metadata": {"k": 1}},
        {"expires_after_days": 0},
        {"name": "n" * 257},
    ],
)
async def test_settings_out_of_bounds_are_refused(catalog, settings):
    with pytest.raises(InvalidRequest):
        await catalog.stores.create(T, StoreSettings(**settings))


async def test_an_unused_store_expires_and_use_puts_it_off(catalog, redis):
    store = await catalog.stores.create(T, StoreSettings(expires_after_days=1))
    key = scope(T, "vs", store.id)
    await redis.hset(key, "last_active_at", store.last_active_at - 86_000)
    assert await catalog.generation(T, store.id) == 0
    assert (await catalog.stores.get(T, store.id)).last_active_at >= store.last_active_at
    await redis.hset(key, "last_active_at", store.last_active_at - 86_401)
    assert (await catalog.stores.get(T, store.id)).expired
    with pytest.raises(InvalidRequest, match="expired"):
        await catalog.generation(T, store.id)


# --- files in stores ---------------------------------------------------------------------------------


async def test_attaching_writes_record_count_and_job_together(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await add_file(catalog)
    [record] = await attach(catalog, jobs, store, file, attributes={"lang": "en", "n": 1, "ok": True})
    assert (record.status, record.version, record.attributes["n"]) == ("in_progress", "", 1)
    assert await catalog.store_files.get(T, store.id, file.id) == record
    assert (await catalog.stores.get(T, store.id)).counts.in_progress == 1
    [task] = await tasks(jobs)
    assert (task["action"], task["vector_store_id"], task["file_id"]) == ("sync_file", store.id, file.id)


async def test_publishing_counts_and_grows_the_generation(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    assert await catalog.published(T, store.id) == (0, ())
    file = await published(catalog, jobs, store, usage=10)
    after = await catalog.stores.get(T, store.id)
    assert (after.generation, after.usage_bytes, after.counts.completed, after.counts.total) == (1, 10, 1, 1)
    generation, records = await catalog.published(T, store.id)
    assert (generation, [(one.file_id, one.version) for one in records]) == (1, [(file.id, "v1")])
    assert records[0].progress == 1.0


async def test_attaching_the_same_again_changes_nothing(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await published(catalog, jobs, store)
    await tasks(jobs)
    [again] = await attach(catalog, jobs, store, file)
    assert (again.status, again.version) == ("completed", "v1")
    assert await tasks(jobs) == []


async def test_another_chunking_serves_the_old_version_until_the_new_one_is_published(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await published(catalog, jobs, store, usage=10)
    chunking = Chunking(max_chunk_size_tokens=200, chunk_overlap_tokens=0)
    [record] = await attach(catalog, jobs, store, file, chunking=chunking)
    assert (record.status, record.version) == ("in_progress", "v1")
    assert len((await catalog.published(T, store.id))[1]) == 1
    assert await catalog.store_files.publish(record, T, "v2", 4)
    after = await catalog.stores.get(T, store.id)
    assert (after.usage_bytes, after.generation, after.counts.total) == (4, 2, 1)


async def test_a_failed_file_tells_why_and_can_be_attached_again(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await add_file(catalog)
    [record] = await attach(catalog, jobs, store, file)
    error = LastError(code="invalid_file", message="the file is empty")
    assert await catalog.store_files.fail(record, T, error)
    failed = await catalog.store_files.get(T, store.id, file.id)
    assert (failed.status, failed.last_error) == ("failed", error)
    assert (await catalog.stores.get(T, store.id)).generation == 0
    [again] = await attach(catalog, jobs, store, file)
    assert (again.status, again.last_error) == ("in_progress", None)


async def test_progress_shows_and_tells_when_it_is_not_wanted_any_more(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await add_file(catalog)
    [record] = await attach(catalog, jobs, store, file)
    assert await catalog.store_files.progress(record, T, 0.25)
    assert (await catalog.store_files.get(T, store.id, file.id)).progress == 0.25
    await catalog.store_files.cancel(T, store.id, file.id)
    assert not await catalog.store_files.progress(record, T, 0.5)
    assert not await catalog.store_files.publish(record, T, "v1", 1)
    assert (await catalog.store_files.get(T, store.id, file.id)).status == "cancelled"


async def test_an_older_attachment_may_not_publish(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await add_file(catalog)
    [old] = await attach(catalog, jobs, store, file)
    await catalog.store_files.remove(T, store.id, file.id, jobs)
    [new] = await attach(catalog, jobs, store, file)
    assert not await catalog.store_files.publish(old, T, "v1", 1)
    assert not await catalog.store_files.fail(old, T, LastError(code="server_error", message=""))
    assert await catalog.store_files.publish(new, T, "v1", 1)


async def test_removing_a_file_takes_it_out_of_search_at_once(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await published(catalog, jobs, store)
    await tasks(jobs)
    await catalog.store_files.remove(T, store.id, file.id, jobs)
    assert await catalog.published(T, store.id) == (2, ())
    after = await catalog.stores.get(T, store.id)
    assert (after.usage_bytes, after.counts.total) == (0, 0)
    with pytest.raises(NotFound):
        await catalog.store_files.get(T, store.id, file.id)
    with pytest.raises(NotFound):
        await catalog.store_files.remove(T, store.id, file.id, jobs)
    assert len(await tasks(jobs)) == 1


async def test_new_attributes_grow_the_generation_and_refresh_the_index(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await published(catalog, jobs, store)
    await tasks(jobs)
    changed = await catalog.store_files.set_attributes(T, store.id, file.id, {"year": 2024}, jobs)
    assert (changed.attributes, changed.version) == ({"year": 2024}, "v1")
    assert await catalog.generation(T, store.id) == 2
    assert [task["refresh"] for task in await tasks(jobs)] == [True]
    with pytest.raises(InvalidRequest, match="16"):
        await catalog.store_files.set_attributes(T, store.id, file.id, {str(n): n for n in range(17)}, jobs)


async def test_files_of_a_store_are_listed_by_status_and_page(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    files = [await add_file(catalog) for _ in range(5)]
    records = await attach(catalog, jobs, store, *files)
    for record in records[:3]:
        await catalog.store_files.publish(record, T, "v", 1)
    query = PageQuery(limit=2, order="asc")
    page = await catalog.store_files.page(T, store.id, query, "completed")
    assert ([one.file_id for one in page.items], page.has_more) == ([files[0].id, files[1].id], True)
    page = await catalog.store_files.page(T, store.id, replace(query, after=files[1].id), "completed")
    assert ([one.file_id for one in page.items], page.has_more) == ([files[2].id], False)
    page = await catalog.store_files.page(T, store.id, replace(query, after=files[2].id), "in_progress")
    assert [one.file_id for one in page.items] == [files[3].id, files[4].id]


async def test_deleting_a_file_removes_it_from_every_store(catalog, jobs):
    stores = [await catalog.stores.create(T, StoreSettings()) for _ in range(2)]
    file = await add_file(catalog)
    for store in stores:
        await attach(catalog, jobs, store, file)
    await tasks(jobs)
    await catalog.delete_file(T, file.id, jobs)
    for store in stores:
        assert (await catalog.stores.get(T, store.id)).counts.total == 0
    assert sorted(task["action"] for task in await tasks(jobs)) == ["drop_file", "sync_file", "sync_file"]
    with pytest.raises(NotFound):
        await catalog.delete_file(T, file.id, jobs)


async def test_a_deleted_store_is_gone_at_once_and_leaves_no_key(catalog, jobs, redis):
    store = await catalog.stores.create(T, StoreSettings())
    file = await published(catalog, jobs, store)
    await catalog.batches.create(T, store.id, [file.id])
    [record] = await catalog.store_files.get_all(T, store.id, [file.id])
    await catalog.delete_store(T, store.id, jobs)
    with pytest.raises(NotFound):
        await catalog.generation(T, store.id)
    with pytest.raises(NotFound):
        await catalog.stores.update(T, store.id, {"name": "zombie"})
    assert not await catalog.store_files.publish(record, T, "v2", 1)
    await catalog.stores.forget(T, store.id)
    assert [key async for key in redis.scan_iter(match=f"*{store.id}*")] == []
    assert await catalog.files.stores_of(T, file.id) == []
    assert (await catalog.stores.page(T, PageQuery())).items == []


async def test_attaching_at_the_same_time_leaves_one_record_and_right_counts(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await add_file(catalog)
    attributes = [{"n": n} for n in range(8)]
    await asyncio.gather(*(attach(catalog, jobs, store, file, attributes=one) for one in attributes))
    record = await catalog.store_files.get(T, store.id, file.id)
    assert record.attributes in attributes
    assert (await catalog.stores.get(T, store.id)).counts.total == 1


# --- batches -----------------------------------------------------------------------------------------


async def test_a_batch_counts_its_files_as_they_are_now(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    files = [await add_file(catalog) for _ in range(3)]
    records = await attach(catalog, jobs, store, *files)
    batch = await catalog.batches.create(T, store.id, [file.id for file in files])
    assert (batch.status, batch.counts.in_progress) == ("in_progress", 3)
    await catalog.store_files.publish(records[0], T, "v", 1)
    await catalog.store_files.fail(records[1], T, LastError(code="invalid_file", message="m"))
    batch = await catalog.batches.cancel(T, store.id, batch.id)
    assert (batch.status, batch.counts.completed, batch.counts.failed) == ("cancelled", 1, 1)
    assert batch.counts.cancelled == 1
    listed = await catalog.batches.page(T, store.id, batch.id, PageQuery(order="asc"), "cancelled")
    assert [one.file_id for one in listed.items] == [files[2].id]


async def test_a_batch_is_listed_in_pages(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    files = [await add_file(catalog) for _ in range(4)]
    await attach(catalog, jobs, store, *files)
    batch = await catalog.batches.create(T, store.id, [file.id for file in files])
    page = await catalog.batches.page(T, store.id, batch.id, PageQuery(limit=3))
    assert ([one.file_id for one in page.items], page.has_more) == ([one.id for one in files[:0:-1]], True)
    page = await catalog.batches.page(T, store.id, batch.id, PageQuery(limit=3, after=files[1].id))
    assert ([one.file_id for one in page.items], page.has_more) == ([files[0].id], False)


# --- tenants -----------------------------------------------------------------------------------------


async def test_what_belongs_to_another_tenant_does_not_exist(catalog, jobs):
    store = await catalog.stores.create(T, StoreSettings())
    file = await published(catalog, jobs, store)
    batch = await catalog.batches.create(T, store.id, [file.id])
    mine = await catalog.stores.create("eve", StoreSettings())
    stolen = Attachment(file_id=file.id)
    for attempt in (
        catalog.files.get("eve", file.id),
        catalog.delete_file("eve", file.id, jobs),
        catalog.stores.get("eve", store.id),
        catalog.stores.update("eve", store.id, {"name": "x"}),
        catalog.delete_store("eve", store.id, jobs),
        catalog.published("eve", store.id),
        catalog.store_files.get("eve", store.id, file.id),
        catalog.store_files.attach("eve", store.id, [(file, stolen)], jobs),
        catalog.store_files.remove("eve", store.id, file.id, jobs),
        catalog.store_files.set_attributes("eve", store.id, file.id, {}, jobs),
        catalog.batches.get("eve", store.id, batch.id),
        catalog.batches.cancel("eve", store.id, batch.id),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await catalog.files.page("eve", PageQuery())).items == []
    assert [one.id for one in (await catalog.stores.page("eve", PageQuery())).items] == [mine.id]
    assert (await catalog.store_files.page("eve", store.id, PageQuery())).items == []


@pytest.mark.parametrize("tenant", ["", "a}b", "a:b", "a b", "x" * 65])
def test_a_name_that_could_leave_its_scope_is_refused(tenant):
    with pytest.raises(InvalidRequest):
        scope(tenant, "files")
