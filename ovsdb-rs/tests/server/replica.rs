use std::path::Path;

use ovsdb_rs::{
    AtomMap, Condition, Datum, Error, Event, Mutation, Origin, Replica, Row, SyncState, Table,
    Transaction, Where,
};

use crate::lab::{DB, Kind, Owner, Part, Server, Thing, connect, schema, soon};

fn named(name: &str) -> Row {
    Row::new().set("name", name)
}

#[tokio::test]
async fn a_replica_holds_what_was_there_and_follows_what_comes() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut tx = Transaction::new();
    let before = tx.insert(
        "Thing",
        named("before").set("tags", ["a"]).set("kind", "plain"),
    );
    let before = client.transact(DB, tx).await.unwrap().uuid(before).unwrap();

    let replica = Replica::builder(DB)
        .table::<Thing>()
        .start(&client)
        .unwrap();
    assert_eq!(replica.snapshot().generation(), 0);
    let snapshot = replica.wait_synced().await.unwrap();
    assert_eq!(snapshot.rows::<Thing>().len(), 1);
    let row = snapshot.get::<Thing>(&before).unwrap();
    assert_eq!((row.name.as_str(), row.kind), ("before", Some(Kind::Plain)));

    // In the replica as soon as the transaction has returned, without waiting.
    let mut tx = Transaction::new();
    let after = tx.insert("Thing", named("after"));
    tx.mutate(
        "Thing",
        before,
        [
            Mutation::insert("tags", ["b"]),
            Mutation::delete("tags", "a"),
        ],
    );
    let after = client.transact(DB, tx).await.unwrap().uuid(after).unwrap();
    assert_eq!(replica.get::<Thing>(&after).unwrap().name, "after");
    assert!(replica.get::<Thing>(&before).unwrap().tags.contains("b"));
    assert_eq!(replica.get::<Thing>(&before).unwrap().tags.len(), 1);
    let mut tx = Transaction::new();
    tx.delete("Thing", after);
    client.transact(DB, tx).await.unwrap();
    assert_eq!(replica.get::<Thing>(&after), None);

    // The old snapshot is what it was.
    assert!(snapshot.get::<Thing>(&before).unwrap().tags.contains("a"));
    assert_eq!(snapshot.rows::<Thing>().len(), 1);
}

#[tokio::test]
async fn every_kind_of_difference_is_applied() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let replica = Replica::builder(DB)
        .table::<Thing>()
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let rows = [
        named("a")
            .set("ratio", 1.0)
            .set("note", "first")
            .set("ratios", [1.0, 2.0])
            .set("pair", [1_i64, 2])
            .set("labels", Datum::map([("k", "1"), ("l", "2")]))
            .set("weights", Datum::map([(1_i64, 1.0)]))
            .set("single", Datum::map([("k", "v")])),
        Row::new()
            .set("ratio", 2.0)
            .set("note", "second")
            .set("ratios", [2.0, 3.0])
            .set("pair", [2_i64, 3])
            .set("labels", Datum::map([("l", "3"), ("m", "4")]))
            .set("weights", Datum::map([(1_i64, 2.0), (2, 1.0)]))
            .set("single", Datum::map([("k", "w")])),
        Row::new()
            .set("ratio", 0.0)
            .set("note", Datum::empty())
            .set("ratios", Datum::empty())
            .set("pair", Datum::empty())
            .set("labels", Datum::Map(AtomMap::default()))
            .set("weights", Datum::Map(AtomMap::default()))
            .set("single", Datum::Map(AtomMap::default())),
    ];
    for (step, row) in rows.into_iter().enumerate() {
        let mut tx = Transaction::new();
        if step == 0 {
            tx.insert("Thing", row);
        } else {
            tx.update("Thing", Where::all(), row);
        }
        let read = tx.select("Thing", Where::all(), []);
        let reply = client.transact(DB, tx).await.unwrap();
        let (uuid, read) = reply.rows::<Thing>(read).unwrap().pop().unwrap();
        assert_eq!(*replica.get::<Thing>(&uuid).unwrap(), read, "step {step}");
    }
}

#[tokio::test]
async fn indexes_find_rows_by_any_of_their_keys() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut builder = Replica::builder(DB).table::<Thing>().table::<Owner>();
    let by_tag = builder.index(|thing: &Thing| thing.tags.clone());
    let by_vm = builder.index(|thing: &Thing| thing.labels.get("vm").cloned());
    let replica = builder.start(&client).unwrap();
    replica.wait_synced().await.unwrap();
    let names = |tag: &str| {
        let mut names: Vec<String> = replica
            .lookup(&by_tag, tag)
            .into_iter()
            .map(|(_, thing)| thing.name.clone())
            .collect();
        names.sort();
        names
    };

    let mut tx = Transaction::new();
    tx.insert("Thing", named("a").set("tags", ["x", "y"]));
    tx.insert(
        "Thing",
        named("b")
            .set("tags", ["y"])
            .set("labels", Datum::map([("vm", "ns/b")])),
    );
    client.transact(DB, tx).await.unwrap();
    assert_eq!(
        (names("x"), names("y")),
        (vec!["a".into()], vec!["a".into(), "b".into()])
    );
    assert_eq!(replica.lookup(&by_vm, "ns/b")[0].1.name, "b");

    let mut tx = Transaction::new();
    tx.mutate(
        "Thing",
        Condition::eq("name", "a"),
        [Mutation::delete("tags", ["x", "y"])],
    );
    tx.mutate(
        "Thing",
        Condition::eq("name", "b"),
        Mutation::put("labels", "vm", "ns/c"),
    );
    client.transact(DB, tx).await.unwrap();
    assert_eq!((names("x"), names("y")), (vec![], vec!["b".to_owned()]));
    assert!(replica.lookup(&by_vm, "ns/b").is_empty());
    assert_eq!(replica.lookup(&by_vm, "ns/c")[0].1.name, "b");
}

#[tokio::test]
async fn changes_tell_old_and_new_of_every_table_in_one_step() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let replica = Replica::builder(DB)
        .table::<Thing>()
        .table::<Owner>()
        .table::<Part>()
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let (snapshot, mut stream) = replica.subscribe();
    let mut tx = Transaction::new();
    let owner = tx.insert("Owner", named("o"));
    let part = tx.insert("Part", Row::new().set("serial", 7_i64));
    let thing = tx.insert("Thing", named("a").set("owner", owner).set("parts", [part]));
    let reply = client.transact(DB, tx).await.unwrap();
    let thing = reply.uuid(thing).unwrap();
    let mut tx = Transaction::new();
    tx.update(
        "Thing",
        thing,
        Row::new().set("count", 1_i64).set("parts", Datum::empty()),
    );
    client.transact(DB, tx).await.unwrap();

    let Some(Event::Changes(first)) = soon(stream.next()).await else {
        panic!("no changes");
    };
    assert_eq!(
        (first.generation, first.origin),
        (snapshot.generation() + 1, Origin::Update)
    );
    assert_eq!(first.changes.len(), 3);
    let inserted: Vec<_> = first.of::<Owner>().collect();
    assert_eq!(inserted.len(), 1);
    assert_eq!(inserted[0].uuid, reply.uuid(owner).unwrap());
    assert_eq!(
        (&inserted[0].old, &inserted[0].new.as_ref().unwrap().name),
        (&None, &"o".into())
    );

    let Some(Event::Changes(second)) = soon(stream.next()).await else {
        panic!("no changes");
    };
    let modified: Vec<_> = second.of::<Thing>().collect();
    let [change] = modified.as_slice() else {
        panic!("{second:?}");
    };
    assert_eq!(change.old.as_ref().unwrap().count, 0);
    assert_eq!(change.new.as_ref().unwrap().count, 1);
    // The part that nothing refers to any more went with the same transaction.
    let collected: Vec<_> = second.of::<Part>().collect();
    assert_eq!(collected[0].uuid, reply.uuid(part).unwrap());
    assert_eq!(collected[0].new, None);
}

#[tokio::test]
async fn a_slow_subscriber_is_told_to_start_over() {
    let server = Server::start();
    let client = connect(server.unix()).await;
    let replica = Replica::builder(DB)
        .table::<Owner>()
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let (_, mut stream) = replica.subscribe();
    let mut tx = Transaction::new();
    let owner = tx.insert("Owner", named("0"));
    let owner = client.transact(DB, tx).await.unwrap().uuid(owner).unwrap();
    let mut last = 0;
    while replica.snapshot().generation() < 1100 {
        last += 1;
        let mut tx = Transaction::new();
        tx.update("Owner", owner, named(&last.to_string()));
        client.transact(DB, tx).await.unwrap();
    }
    let Some(Event::Reset(snapshot)) = soon(stream.next()).await else {
        panic!("not told");
    };
    assert_eq!(
        snapshot.get::<Owner>(&owner).unwrap().name,
        last.to_string()
    );
    let mut tx = Transaction::new();
    tx.update("Owner", owner, named("next"));
    client.transact(DB, tx).await.unwrap();
    let Some(Event::Changes(set)) = soon(stream.next()).await else {
        panic!("no changes");
    };
    assert_eq!(set.generation, snapshot.generation() + 1);
}

#[tokio::test]
async fn conditions_select_rows_that_meet_any_of_them() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let replica = Replica::builder(DB)
        .table_where::<Thing>([
            Condition::includes("tags", ["mine"]),
            Condition::eq("name", "special"),
        ])
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let mut tx = Transaction::new();
    tx.insert("Thing", named("a").set("tags", ["mine", "x"]));
    tx.insert("Thing", named("special"));
    tx.insert("Thing", named("other"));
    client.transact(DB, tx).await.unwrap();
    let names = || {
        let mut names: Vec<_> = replica
            .rows::<Thing>()
            .iter()
            .map(|(_, row)| row.name.clone())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["a", "special"]);

    // A row that begins to meet them comes whole, one that ceases to goes.
    let mut tx = Transaction::new();
    tx.mutate(
        "Thing",
        Condition::eq("name", "a"),
        [Mutation::delete("tags", "mine")],
    );
    tx.mutate(
        "Thing",
        Condition::eq("name", "other"),
        [Mutation::insert("tags", "mine")],
    );
    client.transact(DB, tx).await.unwrap();
    assert_eq!(names(), ["other", "special"]);
}

ovsdb_rs::table! {
    struct Noted in "Thing" {
        note: String,
    }

    struct NoSuchTable in "No_Such_Table" {
        name: String,
    }

    struct NoSuchColumn in "Owner" {
        name: String,
        no_such_column: String,
    }
}

#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
struct Newer {
    name: String,
    nickname: Option<String>,
}

impl Table for Newer {
    const NAME: &'static str = "Owner";
    const COLUMNS: &'static [&'static str] = &["name", "nickname"];
    const OPTIONAL_COLUMNS: &'static [&'static str] = &["nickname"];
}

#[tokio::test]
async fn a_row_that_does_not_fit_is_listed_and_does_not_hide_the_others() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let replica = Replica::builder(DB)
        .table::<Noted>()
        .start(&client)
        .unwrap();
    let mut tx = Transaction::new();
    let bad = tx.insert("Thing", named("bad"));
    tx.insert("Thing", named("good").set("note", "n"));
    let reply = client.transact(DB, tx).await.unwrap();
    let bad = reply.uuid(bad).unwrap();

    let snapshot = replica.wait_synced().await.unwrap();
    assert_eq!(snapshot.rows::<Noted>().len(), 1);
    let malformed = snapshot.malformed();
    assert_eq!((malformed[0].table, malformed[0].uuid), ("Thing", bad));
    assert!(
        malformed[0].reason.contains("column \"note\""),
        "{malformed:?}"
    );

    let mut tx = Transaction::new();
    tx.update("Thing", bad, Row::new().set("note", "mended"));
    client.transact(DB, tx).await.unwrap();
    assert_eq!(replica.get::<Noted>(&bad).unwrap().note, "mended");
    assert!(replica.snapshot().malformed().is_empty());
}

#[tokio::test]
async fn what_the_schema_lacks_is_refused_by_name() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    for (builder, missing) in [
        (
            Replica::builder(DB).table::<NoSuchTable>(),
            "no table No_Such_Table",
        ),
        (
            Replica::builder(DB).table::<NoSuchColumn>(),
            "no column no_such_column",
        ),
        (
            Replica::builder("Nowhere").table::<Owner>(),
            "unknown database",
        ),
    ] {
        let replica = builder.start(&client).unwrap();
        let error = soon(replica.wait_synced()).await.unwrap_err();
        assert!(error.to_string().contains(missing), "{error}");
        assert!(!replica.is_synced());
    }
    let replica = Replica::builder(DB)
        .table::<Newer>()
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
}

#[tokio::test]
async fn a_builder_without_sense_does_not_start() {
    let server = Server::start();
    let client = connect(server.unix()).await;
    let twice = Replica::builder(DB)
        .table::<Owner>()
        .table::<NoSuchColumn>();
    assert!(matches!(twice.start(&client), Err(Error::Replica { .. })));
    let mut builder = Replica::builder(DB);
    builder.index(|owner: &Owner| Some(owner.name.clone()));
    assert!(matches!(builder.start(&client), Err(Error::Replica { .. })));
}

#[tokio::test]
async fn a_converted_schema_is_followed_without_a_reconnection() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let replica = Replica::builder(DB)
        .table::<Newer>()
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let mut tx = Transaction::new();
    let owner = tx.insert("Owner", named("o"));
    let owner = client.transact(DB, tx).await.unwrap().uuid(owner).unwrap();
    let connection = client.connection_state();
    let generation = replica.snapshot().generation();

    convert(&server, r#""nickname": {"type": "string"}, "name""#);
    let nickname = |text: &str| Newer {
        name: "o".into(),
        nickname: Some(text.into()),
    };
    let mut changed = replica.changed();
    soon(changed.wait_for(|now| *now > generation))
        .await
        .unwrap();
    soon(replica.wait_synced()).await.unwrap();
    assert_eq!(*replica.get::<Newer>(&owner).unwrap(), nickname(""));
    assert!(!connection.has_changed().unwrap());
    let mut tx = Transaction::new();
    tx.update("Owner", owner, Row::new().set("nickname", "n"));
    client.transact(DB, tx).await.unwrap();
    assert_eq!(*replica.get::<Newer>(&owner).unwrap(), nickname("n"));

    // Back to the schema without it.
    let generation = replica.snapshot().generation();
    server.convert(&schema());
    soon(changed.wait_for(|now| *now > generation))
        .await
        .unwrap();
    assert_eq!(replica.get::<Newer>(&owner).unwrap().nickname, None);
}

/// Converts the database to its schema with the name column of owners replaced.
fn convert(server: &Server, column: &str) {
    let text = std::fs::read_to_string(schema()).unwrap();
    let (head, tail) = text.split_once(r#""Owner": {"#).unwrap();
    let tail = tail.replacen(r#""name""#, column, 1);
    let path = server.path("converted.json");
    std::fs::write(&path, format!(r#"{head}"Owner": {{{tail}"#)).unwrap();
    server.convert(Path::new(&path));
}

#[tokio::test]
async fn the_last_clone_of_a_replica_takes_its_monitor_along() {
    let server = Server::start();
    let proxy = crate::proxy::Proxy::before(server.unix(), None).await;
    let client = connect(proxy.endpoint()).await;
    let replica = Replica::builder(DB)
        .table::<Owner>()
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let (_, stream) = replica.subscribe();
    drop(replica);
    client.list_dbs().await.unwrap();
    assert_eq!(proxy.count(crate::proxy::From::Client, "monitor_cancel"), 0);
    drop(stream);
    let seen = |proxy: &crate::proxy::Proxy| {
        proxy.count(crate::proxy::From::Client, "monitor_cancel") == 1
    };
    soon(proxy.until(seen)).await;
    // Its rows may come no more, and the session goes on.
    let mut tx = Transaction::new();
    tx.insert("Owner", named("o"));
    client.transact(DB, tx).await.unwrap();
    assert_eq!(proxy.count(crate::proxy::From::Server, "update3"), 0);
}

#[tokio::test]
async fn a_stream_ends_with_its_clients_task() {
    let server = Server::start();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let endpoint = server.unix();
    let replica = runtime
        .spawn(async move {
            let client = connect(endpoint).await;
            let replica = Replica::builder(DB)
                .table::<Owner>()
                .start(&client)
                .unwrap();
            replica.wait_synced().await.unwrap();
            replica
        })
        .await
        .unwrap();
    let (_, mut stream) = replica.subscribe();
    runtime.shutdown_background();
    assert!(soon(stream.next()).await.is_none());
    let mut state = replica.sync_state();
    let settled = soon(state.wait_for(|state| *state == SyncState::Stale)).await;
    assert!(settled.is_err() || !replica.is_synced());
}
