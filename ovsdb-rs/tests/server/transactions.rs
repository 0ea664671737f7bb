use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::Duration;

use ovsdb_rs::{
    Cause, Client, Condition, Datum, Endpoint, Error, ErrorKind, Function, Mutation, Mutator, Row,
    Transaction, TransactionError, WaitOp, Where,
};
use uuid::Uuid;

use crate::lab::{DB, Kind, Owner, Server, Thing, connect, options, soon};

async fn commit(client: &Client, tx: Transaction) {
    client.transact(DB, tx).await.unwrap();
}

async fn refusal(client: &Client, tx: Transaction) -> TransactionError {
    let error = client.transact(DB, tx).await.unwrap_err();
    error
        .as_transaction()
        .cloned()
        .unwrap_or_else(|| panic!("{error:?}"))
}

async fn thing(client: &Client, name: &str) -> Option<(Uuid, Thing)> {
    let mut tx = Transaction::new();
    let select = tx.select("Thing", Condition::eq("name", name), []);
    let reply = client.transact(DB, tx).await.unwrap();
    let mut rows = reply.rows::<Thing>(select).unwrap();
    assert!(rows.len() <= 1);
    rows.pop()
}

fn insert_thing(tx: &mut Transaction, name: &str) -> ovsdb_rs::InsertOp {
    tx.insert("Thing", Row::new().set("name", name))
}

async fn every_kind_of_column_comes_back(endpoint: Endpoint) {
    let client = connect(endpoint).await;
    let token = Uuid::new_v4();
    let mut tx = Transaction::new();
    let owner = tx.insert("Owner", Row::new().set("name", "Ödön \"quoted\" \\ {["));
    let part = tx.insert("Part", Row::new().set("serial", i64::MIN));
    let plain = insert_thing(&mut tx, "default");
    let full = tx.insert(
        "Thing",
        Row::new()
            .set("name", "full")
            .set("count", i64::MAX)
            .set("ratio", 0.25)
            .set("flag", true)
            .set("kind", "fancy")
            .set("note", Some("n"))
            .set("limit", 7_i64)
            .set("token", token)
            .set("tags", vec!["b", "a"])
            .set("numbers", [3_i64, -1])
            .set("ratios", [1.0, 2.5])
            .set("pair", [1_i64])
            .set("labels", BTreeMap::from([("k", "v"), ("l", "")]))
            .set("weights", BTreeMap::from([(1_i64, 3.0)]))
            .set("single", BTreeMap::from([("only", "one")]))
            .set("owner", owner)
            .set("friends", [plain])
            .set("parts", [&part]),
    );
    let reply = client.transact(DB, tx).await.unwrap();

    let (uuid, row) = thing(&client, "full").await.unwrap();
    assert_eq!(uuid, reply.uuid(full).unwrap());
    assert_eq!(
        row,
        Thing {
            name: "full".into(),
            count: i64::MAX,
            ratio: 0.25,
            flag: true,
            kind: Some(Kind::Fancy),
            note: Some("n".into()),
            limit: Some(7),
            token: Some(token),
            tags: BTreeSet::from(["a".into(), "b".into()]),
            numbers: vec![-1, 3],
            ratios: vec![1.0, 2.5],
            pair: vec![1],
            labels: BTreeMap::from([("k".into(), "v".into()), ("l".into(), String::new())]),
            weights: BTreeMap::from([(1, 3.0)]),
            single: BTreeMap::from([("only".into(), "one".into())]),
            owner: Some(reply.uuid(owner).unwrap()),
            friends: BTreeSet::from([reply.uuid(plain).unwrap()]),
            parts: BTreeSet::from([reply.uuid(part).unwrap()]),
        }
    );
    let (_, row) = thing(&client, "default").await.unwrap();
    assert_eq!((row.count, row.ratio, row.flag), (0, 0.0, false));
    assert_eq!((row.kind, row.note, row.owner), (None, None, None));
    assert!(row.tags.is_empty() && row.labels.is_empty() && row.ratios.is_empty());

    let mut tx = Transaction::new();
    let owners = tx.select("Owner", Where::all(), ["name"]);
    let reply = client.transact(DB, tx).await.unwrap();
    let owners = reply.rows::<Owner>(owners).unwrap();
    assert_eq!(owners[0].1.name, "Ödön \"quoted\" \\ {[");
}

#[tokio::test]
async fn every_kind_of_column_comes_back_over_a_unix_socket() {
    let server = Server::start();
    every_kind_of_column_comes_back(server.unix()).await;
}

#[tokio::test]
async fn every_kind_of_column_comes_back_over_tcp() {
    let server = Server::start();
    every_kind_of_column_comes_back(server.tcp()).await;
}

#[tokio::test]
async fn update_sets_columns_of_matching_rows_and_counts_them() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut tx = Transaction::new();
    for (name, count) in [("a", 1_i64), ("b", 2), ("c", 3)] {
        tx.insert("Thing", Row::new().set("name", name).set("count", count));
    }
    commit(&client, tx).await;

    let mut tx = Transaction::new();
    let updated = tx.update(
        "Thing",
        [
            Condition::new("count", Function::GreaterOrEqual, 2_i64),
            Condition::new("count", Function::Less, 4_i64),
            Condition::ne("name", "nobody"),
        ],
        Row::new().set("note", "big"),
    );
    let none = tx.update(
        "Thing",
        Condition::eq("name", "nobody"),
        Row::new().set("note", "nobody"),
    );
    let reply = client.transact(DB, tx).await.unwrap();

    assert_eq!(reply.count(updated).unwrap(), 2);
    assert_eq!(reply.count(none).unwrap(), 0);
    assert_eq!(thing(&client, "a").await.unwrap().1.note, None);
    assert_eq!(thing(&client, "b").await.unwrap().1.note.unwrap(), "big");
    let mut tx = Transaction::new();
    tx.update(
        "Thing",
        Where::all(),
        Row::new().set("note", Datum::empty()),
    );
    commit(&client, tx).await;
    assert_eq!(thing(&client, "b").await.unwrap().1.note, None);
}

#[tokio::test]
async fn mutate_changes_numbers_sets_and_single_keys_of_maps() {
    let server = Server::start();
    let client = connect(server.unix()).await;
    let mut tx = Transaction::new();
    tx.insert(
        "Thing",
        Row::new()
            .set("name", "a")
            .set("count", 10_i64)
            .set("tags", ["x", "y"])
            .set(
                "labels",
                Datum::map([("keep", "1"), ("drop", "2"), ("change", "3")]),
            ),
    );
    commit(&client, tx).await;

    let mut tx = Transaction::new();
    let mut mutations = vec![
        Mutation::new("count", Mutator::Add, 5_i64),
        Mutation::new("count", Mutator::Multiply, 3_i64),
        Mutation::new("count", Mutator::Subtract, 1_i64),
        Mutation::new("count", Mutator::Divide, 4_i64),
        Mutation::new("count", Mutator::Remainder, 8_i64),
        Mutation::insert("tags", ["y", "z"]),
        Mutation::delete("tags", "x"),
        Mutation::insert("labels", Datum::map([("keep", "not taken")])),
        Mutation::delete("labels", Datum::map([("keep", "not its value")])),
        Mutation::delete_keys("labels", ["drop", "absent"]),
    ];
    mutations.extend(Mutation::put("labels", "change", "4"));
    let mutated = tx.mutate("Thing", Condition::eq("name", "a"), mutations);
    let reply = client.transact(DB, tx).await.unwrap();

    assert_eq!(reply.count(mutated).unwrap(), 1);
    let (_, row) = thing(&client, "a").await.unwrap();
    assert_eq!(row.count, ((10 + 5) * 3 - 1) / 4 % 8);
    assert_eq!(row.tags, BTreeSet::from(["y".into(), "z".into()]));
    assert_eq!(
        row.labels,
        BTreeMap::from([("change".into(), "4".into()), ("keep".into(), "1".into())])
    );

    let mut tx = Transaction::new();
    tx.mutate(
        "Thing",
        Where::all(),
        [Mutation::new("count", Mutator::Divide, 0_i64)],
    );
    let error = refusal(&client, tx).await;
    assert_eq!(
        (error.kind, error.operation.unwrap().0),
        (ErrorKind::DomainError, 0)
    );
}

#[tokio::test]
async fn delete_removes_by_uuid_and_by_condition() {
    let server = Server::start();
    let client = connect(server.unix()).await;
    let mut tx = Transaction::new();
    let first = insert_thing(&mut tx, "a");
    tx.insert("Thing", Row::new().set("name", "b").set("tags", ["t", "u"]));
    tx.insert("Thing", Row::new().set("name", "c").set("tags", ["t"]));
    let reply = client.transact(DB, tx).await.unwrap();

    let mut tx = Transaction::new();
    let by_uuid = tx.delete("Thing", reply.uuid(first).unwrap());
    let by_tags = tx.delete(
        "Thing",
        [
            Condition::includes("tags", ["t"]),
            Condition::excludes("tags", ["u"]),
        ],
    );
    let reply = client.transact(DB, tx).await.unwrap();

    assert_eq!(
        (reply.count(by_uuid).unwrap(), reply.count(by_tags).unwrap()),
        (1, 1)
    );
    assert!(thing(&client, "a").await.is_none());
    assert!(thing(&client, "b").await.is_some());
    assert!(thing(&client, "c").await.is_none());
}

#[tokio::test]
async fn an_operation_can_refer_to_a_row_inserted_after_it() {
    let server = Server::start();
    let client = connect(server.unix()).await;
    let mut tx = Transaction::new();
    let placeholder = insert_thing(&mut tx, "placeholder");
    let owner = tx.insert("Owner", Row::new().set("name", "o"));
    tx.update(
        "Thing",
        Condition::eq("_uuid", placeholder),
        Row::new().set("owner", owner),
    );
    let reply = client.transact(DB, tx).await.unwrap();

    let (_, row) = thing(&client, "placeholder").await.unwrap();
    assert_eq!(row.owner, Some(reply.uuid(owner).unwrap()));
}

#[tokio::test]
async fn an_insert_with_a_uuid_of_its_own_cannot_happen_twice() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let uuid = Uuid::new_v4();
    let insert = || {
        let mut tx = Transaction::new();
        let op = tx.insert_with_uuid("Owner", uuid, Row::new().set("name", "o"));
        (tx, op)
    };
    let (tx, op) = insert();
    let reply = client.transact(DB, tx).await.unwrap();
    assert_eq!(reply.uuid(op).unwrap(), uuid);

    assert_eq!(
        refusal(&client, insert().0).await.kind,
        ErrorKind::DuplicateUuid
    );
}

#[tokio::test]
async fn a_guard_that_is_not_met_prevents_every_write() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut tx = Transaction::new();
    tx.insert(
        "Thing",
        Row::new()
            .set("name", "a")
            .set("labels", Datum::map([("epoch", "1")])),
    );
    commit(&client, tx).await;

    let guarded = |epoch: &str, note: &str| {
        let mut tx = Transaction::new();
        tx.expect(
            "Thing",
            [
                Condition::eq("name", "a"),
                Condition::includes("labels", Datum::map([("epoch", epoch)])),
            ],
            Row::new().set("name", "a"),
        );
        tx.update(
            "Thing",
            Condition::eq("name", "a"),
            Row::new().set("note", note),
        );
        tx
    };
    commit(&client, guarded("1", "first")).await;
    let error = client
        .transact(DB, guarded("2", "second"))
        .await
        .unwrap_err();

    assert!(error.is_guard_failure() && error.unchanged(), "{error}");
    assert_eq!(thing(&client, "a").await.unwrap().1.note.unwrap(), "first");
}

#[tokio::test]
async fn wait_holds_the_transaction_until_another_client_makes_it_true() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let other = connect(server.unix()).await;
    let mut tx = Transaction::new();
    tx.wait(
        "Thing",
        Condition::eq("name", "signal"),
        ["name"],
        WaitOp::NotEqual,
        [],
        Some(Duration::from_secs(20)),
    );
    insert_thing(&mut tx, "follows");
    let mut waiting = pin!(client.transact(DB, tx));
    // The first poll sends it; the select that follows it is answered after the server saw it.
    assert!(futures::poll!(&mut waiting).is_pending());
    assert!(thing(&client, "follows").await.is_none());
    assert!(futures::poll!(&mut waiting).is_pending());

    let mut tx = Transaction::new();
    insert_thing(&mut tx, "signal");
    commit(&other, tx).await;
    soon(waiting).await.unwrap();
    assert!(thing(&other, "follows").await.is_some());
}

#[tokio::test]
async fn a_wait_reports_its_own_timeout_as_the_servers_refusal() {
    let server = Server::start();
    // The wait's own time is added to the call's.
    let limits = ovsdb_rs::ClientOptions {
        call_timeout: Duration::from_secs(1),
        ..options()
    };
    let client = Client::connect(server.tcp(), limits).await.unwrap();
    let mut tx = Transaction::new();
    tx.comment("first");
    tx.wait(
        "Thing",
        Where::all(),
        ["name"],
        WaitOp::Equal,
        [Row::new().set("name", "never")],
        Some(Duration::from_millis(1200)),
    );
    let error = refusal(&client, tx).await;
    assert_eq!(
        (error.kind, error.operation.unwrap().0),
        (ErrorKind::TimedOut, 1)
    );
}

#[tokio::test]
async fn a_transaction_past_its_deadline_is_indeterminate_and_cancelled() {
    let server = Server::start();
    let limits = ovsdb_rs::ClientOptions {
        call_timeout: Duration::from_secs(1),
        ..options()
    };
    let client = Client::connect(server.tcp(), limits).await.unwrap();
    let mut tx = Transaction::new();
    tx.wait(
        "Thing",
        Condition::eq("name", "signal"),
        ["name"],
        WaitOp::NotEqual,
        [],
        None,
    );
    insert_thing(&mut tx, "follows");
    let error = client.transact(DB, tx).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Indeterminate {
                cause: Cause::Deadline(_)
            }
        ),
        "{error:?}"
    );
    assert!(!error.unchanged());

    // What the abandoned transaction waited for; on the same connection, after the cancellation.
    let mut tx = Transaction::new();
    insert_thing(&mut tx, "signal");
    commit(&client, tx).await;
    assert!(thing(&client, "follows").await.is_none());
}

#[tokio::test]
async fn commit_comment_abort_and_assert_do_as_they_say() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut tx = Transaction::new();
    tx.comment("a comment");
    insert_thing(&mut tx, "durable");
    tx.commit(true);
    commit(&client, tx).await;
    assert!(thing(&client, "durable").await.is_some());
    let log = std::fs::read_to_string(server.path("db")).unwrap();
    assert!(log.contains("a comment"), "{log}");

    let mut tx = Transaction::new();
    insert_thing(&mut tx, "aborted");
    tx.abort();
    insert_thing(&mut tx, "after");
    let error = refusal(&client, tx).await;
    assert_eq!(
        (error.kind, error.operation.unwrap().0),
        (ErrorKind::Aborted, 1)
    );
    assert!(thing(&client, "aborted").await.is_none());

    let mut tx = Transaction::new();
    tx.assert_lock("nobodys");
    assert_eq!(refusal(&client, tx).await.kind, ErrorKind::NotOwner);
}

#[tokio::test]
async fn what_only_the_commit_can_tell_is_reported_without_an_operation() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut tx = Transaction::new();
    let owner = tx.insert("Owner", Row::new().set("name", "o"));
    tx.insert("Thing", Row::new().set("name", "a").set("owner", owner));
    let reply = client.transact(DB, tx).await.unwrap();

    let mut tx = Transaction::new();
    insert_thing(&mut tx, "b");
    insert_thing(&mut tx, "a");
    let error = refusal(&client, tx).await;
    assert_eq!(
        (&error.kind, &error.operation),
        (&ErrorKind::ConstraintViolation, &None)
    );
    assert!(
        error
            .to_string()
            .starts_with("Lab: commit: constraint violation: "),
        "{error}"
    );
    assert!(thing(&client, "b").await.is_none());

    let mut tx = Transaction::new();
    tx.delete("Owner", reply.uuid(owner).unwrap());
    let error = refusal(&client, tx).await;
    assert_eq!(error.kind, ErrorKind::ReferentialIntegrityViolation);
    assert_eq!(error.operation, None);

    let mut tx = Transaction::new();
    tx.insert(
        "Thing",
        Row::new().set("name", "c").set("owner", Uuid::new_v4()),
    );
    let error = refusal(&client, tx).await;
    assert_eq!(error.kind, ErrorKind::ReferentialIntegrityViolation);
}

#[tokio::test]
async fn a_failed_operation_is_named() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut tx = Transaction::new();
    insert_thing(&mut tx, "a");
    tx.insert("Thing", Row::new().set("name", "b").set("limit", -1_i64));
    insert_thing(&mut tx, "c");
    let error = refusal(&client, tx).await;
    assert_eq!(error.kind, ErrorKind::ConstraintViolation);
    assert_eq!(error.operation, Some((1, "insert into Thing".into())));

    let mut tx = Transaction::new();
    tx.insert("Thing", Row::new().set("no_such_column", "a"));
    let error = refusal(&client, tx).await;
    assert_eq!(error.operation.as_ref().unwrap().0, 0);
    assert!(error.to_string().contains("no_such_column"), "{error}");

    let error = client
        .transact("Nowhere", Transaction::new())
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Rpc {
                kind: ErrorKind::UnknownDatabase,
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_row_that_does_not_fit_its_struct_names_the_column() {
    #[derive(Debug, serde::Deserialize)]
    struct Wrong {
        #[allow(dead_code, reason = "it never gets as far as being read")]
        note: String,
    }
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut tx = Transaction::new();
    insert_thing(&mut tx, "a");
    let select = tx.select("Thing", Where::all(), ["note"]);
    let reply = client.transact(DB, tx).await.unwrap();

    let error = reply.rows::<Wrong>(select).unwrap_err();
    assert!(error.to_string().contains("column \"note\""), "{error}");
    assert_eq!(
        reply.raw_rows(select).unwrap()[0].get("note"),
        Some(&Datum::empty())
    );
}

#[tokio::test]
async fn the_servers_databases_and_schemas_are_told() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let mut names = client.list_dbs().await.unwrap();
    names.sort();
    assert_eq!(names, ["Lab", "_Server"]);
    let schema = client.get_schema(DB).await.unwrap();
    assert_eq!(schema.tables["Thing"].indexes, [["name"]]);
    assert_eq!(schema.tables["Thing"].columns["pair"].max, 2);
    assert!(!schema.tables["Part"].columns["serial"].mutable);
    let error = client.get_schema("Nowhere").await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Rpc {
                kind: ErrorKind::UnknownDatabase,
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_call_that_finds_no_server_says_that_it_was_not_sent() {
    let directory = tempfile::tempdir().unwrap();
    let limits = ovsdb_rs::ClientOptions {
        call_timeout: Duration::from_millis(200),
        ..options()
    };
    let nowhere = Endpoint::Unix(directory.path().join("nowhere"));
    let client = Client::spawn(nowhere.clone(), limits.clone());
    let mut tx = Transaction::new();
    insert_thing(&mut tx, "a");
    let error = client.transact(DB, tx).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotSent {
                cause: Cause::NotConnected(_),
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.unchanged());
    let error = Client::connect(nowhere, limits).await.unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[tokio::test]
async fn many_calls_share_a_connection_and_get_their_own_answers() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let calls = (0..200_i64).map(|count| {
        let client = client.clone();
        tokio::spawn(async move {
            let name = format!("thing{count}");
            let mut tx = Transaction::new();
            tx.insert("Thing", Row::new().set("name", &name).set("count", count));
            let select = tx.select("Thing", Condition::eq("name", &name), ["count"]);
            let reply = client.transact(DB, tx).await.unwrap();
            let row = &reply.raw_rows(select).unwrap()[0];
            assert_eq!(row.get("count"), Some(&Datum::from(count)));
        })
    });
    for call in calls.collect::<Vec<_>>() {
        soon(call).await.unwrap();
    }
}
