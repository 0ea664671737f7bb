//! Peers that answer nonsense, too much, too little, or nothing.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use ovsdb_rs::{
    Cause, Client, ClientOptions, Endpoint, Error, FrameDecoder, Replica, Row, SyncState,
    Transaction,
};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::codec::FramedRead;

use crate::lab::{DB, Owner, options, soon};

/// A server whose answers a test makes up.
struct Fake {
    endpoint: Endpoint,
    /// What clients sent, less handshakes and probes, with the number of the connection.
    seen: Arc<Mutex<Vec<(usize, Value)>>>,
}

/// What a [`Fake`] does on a message.
enum Act {
    Send(String),
    /// Sends, then closes.
    SendAndClose(String),
    Nothing,
}

impl Fake {
    /// Does `script` for each message of the connections, numbered from 0. Handshakes and probes
    /// are answered as they should be.
    async fn start(script: impl Fn(usize, &Value) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (script, log) = (Arc::new(script), seen.clone());
        tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(converse(stream, connection, script.clone(), log.clone()));
            }
        });
        Self { endpoint, seen }
    }

    /// A server that greets with `bytes`, and answers nothing.
    async fn greeting(bytes: &'static [u8]) -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
        tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(bytes).await.unwrap();
                open.push(stream);
            }
        });
        endpoint
    }

    fn count(&self, method: &str) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|(_, message)| message["method"] == method)
            .count()
    }
}

async fn converse(
    stream: TcpStream,
    connection: usize,
    script: Arc<impl Fn(usize, &Value) -> Act>,
    seen: Arc<Mutex<Vec<(usize, Value)>>>,
) {
    let (reader, mut writer) = stream.into_split();
    let mut frames = FramedRead::new(reader, FrameDecoder::new(usize::MAX));
    while let Some(Ok(frame)) = frames.next().await {
        let frame: Bytes = frame;
        let message: Value = serde_json::from_slice(&frame).unwrap();
        let act = match message["method"].as_str() {
            Some("set_db_change_aware") => Act::Send(answer(&message, &json!({}))),
            Some("echo") => Act::Send(answer(&message, &message["params"])),
            _ => {
                seen.lock().unwrap().push((connection, message.clone()));
                script(connection, &message)
            }
        };
        let written = match act {
            Act::Send(text) => writer.write_all(text.as_bytes()).await,
            Act::SendAndClose(text) => {
                let _ = writer.write_all(text.as_bytes()).await;
                return;
            }
            Act::Nothing => Ok(()),
        };
        if written.is_err() {
            return;
        }
    }
}

fn answer(request: &Value, result: &Value) -> String {
    json!({"id": request["id"], "result": result, "error": null}).to_string()
}

fn impatient() -> ClientOptions {
    ClientOptions {
        call_timeout: Duration::from_secs(1),
        connect_timeout: Duration::from_millis(300),
        ..options()
    }
}

fn insert() -> Transaction {
    let mut tx = Transaction::new();
    tx.insert("Owner", Row::new().set("name", "o"));
    tx
}

#[rstest]
#[case::nothing(b"", "no sign of life")]
#[case::another_protocol(b"HTTP/1.1 400 Bad Request\r\n\r\n", "is this an OVSDB server?")]
#[case::an_array(b"[]", "is this an OVSDB server?")]
#[case::no_message(b"{}", "neither a method nor an id")]
#[case::not_json(b"{\"id\":}", "expected value")]
#[case::not_utf8(b"{\"id\":1,\"result\":\"\xff\"}", "invalid unicode")]
#[case::unbalanced(b"{\"id\":1]", "closes more brackets")]
#[tokio::test]
async fn a_server_that_greets_with_nonsense_is_no_server(
    #[case] greeting: &'static [u8],
    #[case] reason: &str,
) {
    let endpoint = Fake::greeting(greeting).await;
    let error = soon(Client::connect(endpoint, impatient()))
        .await
        .unwrap_err();
    let Error::NotSent {
        cause: Cause::NotConnected(cause),
        ..
    } = &error
    else {
        panic!("{error:?}");
    };
    assert!(cause.contains(reason), "{cause}");
}

#[tokio::test]
async fn a_call_without_an_answer_ends_at_its_deadline() {
    let fake = Fake::start(|_, _| Act::Nothing).await;
    let client = Client::connect(fake.endpoint.clone(), impatient())
        .await
        .unwrap();
    let error = soon(client.list_dbs()).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoReply {
                cause: Cause::Deadline(_),
                ..
            }
        ),
        "{error:?}"
    );
    let error = soon(client.transact(DB, insert())).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Indeterminate {
                cause: Cause::Deadline(_)
            }
        ),
        "{error:?}"
    );
    let error = soon(client.lock("leader")).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoReply {
                cause: Cause::Deadline(_),
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_answer_to_another_call_is_none_to_this() {
    let fake = Fake::start(|_, request| {
        let id = request["id"].as_u64().unwrap() + 1000;
        Act::Send(answer(&json!({ "id": id }), &json!(["Wrong"])))
    })
    .await;
    let client = Client::connect(fake.endpoint.clone(), impatient())
        .await
        .unwrap();
    let error = soon(client.list_dbs()).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoReply {
                cause: Cause::Deadline(_),
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_transaction_is_never_sent_twice_and_a_read_is() {
    let fake = Fake::start(|connection, request| {
        if connection == 0 || request["method"] == "transact" {
            Act::SendAndClose(String::new())
        } else {
            Act::Send(answer(request, &json!(["Lab"])))
        }
    })
    .await;
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    assert_eq!(soon(client.list_dbs()).await.unwrap(), ["Lab"]);
    assert_eq!(fake.count("list_dbs"), 2);

    let error = soon(client.transact(DB, insert())).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Indeterminate {
                cause: Cause::Disconnected(_)
            }
        ),
        "{error:?}"
    );
    soon(client.list_dbs()).await.unwrap();
    assert_eq!(fake.count("transact"), 1);
}

#[tokio::test]
async fn half_an_answer_is_none() {
    let fake = Fake::start(|_, request| {
        let mut text = answer(request, &json!([{"uuid": ["uuid", "0"]}]));
        text.truncate(text.len() / 2);
        Act::SendAndClose(text)
    })
    .await;
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    let error = soon(client.transact(DB, insert())).await.unwrap_err();
    let Error::Indeterminate {
        cause: Cause::Disconnected(reason),
    } = &error
    else {
        panic!("{error:?}");
    };
    assert!(reason.contains("ended inside of a message"), "{reason}");
}

#[tokio::test]
async fn an_answer_beyond_the_limit_names_the_limit() {
    let fake = Fake::start(|_, request| Act::Send(answer(request, &json!("x".repeat(5000))))).await;
    let limited = ClientOptions {
        max_frame: 4000,
        ..options()
    };
    let client = Client::connect(fake.endpoint.clone(), limited)
        .await
        .unwrap();
    let error = soon(client.transact(DB, insert())).await.unwrap_err();
    assert!(error.to_string().contains("max_frame"), "{error}");
}

#[rstest]
#[case::no_array(json!(5))]
#[case::null(json!(null))]
#[case::too_few(json!([]))]
#[case::too_many(json!([{"uuid": ["uuid", "6a57a4cb-1a0f-4b0d-9a53-4b7f6f4f7a0e"]}, {}]))]
#[case::unattempted_without_error(json!([null]))]
#[case::another_operations(json!([{"count": 1}]))]
#[case::not_a_uuid(json!([{"uuid": ["uuid", "6a57a4cb"]}]))]
#[case::a_named_uuid(json!([{"uuid": ["named-uuid", "row0"]}]))]
#[tokio::test]
async fn results_that_are_none_leave_a_transaction_indeterminate(#[case] result: Value) {
    let fake = Fake::start(move |_, request| Act::Send(answer(request, &result))).await;
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    let error = soon(client.transact(DB, insert())).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Indeterminate {
                cause: Cause::Nonsense(_)
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn deep_nesting_is_an_error_and_not_a_crash() {
    let fake = Fake::start(|_, request| {
        let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
        Act::Send(format!(
            r#"{{"id":{},"error":null,"result":{deep}}}"#,
            request["id"]
        ))
    })
    .await;
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    let error = soon(client.list_dbs()).await.unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    soon(client.transact(DB, insert())).await.unwrap_err();
}

#[tokio::test]
async fn requests_of_the_server_are_answered_one_way_or_the_other() {
    let fake = Fake::start(|_, message| match message["method"].as_str() {
        // Several messages in one write, as the network may deliver them, and white space.
        Some("list_dbs") => Act::Send(
            [
                r#"{"id":"e","method":"echo","params":[{"a":["}"]}]}"#.to_owned(),
                r#"{"id":null,"method":"gossip","params":[]}"#.to_owned(),
                r#"{"id":[7],"method":"reboot","params":[]}"#.to_owned(),
                answer(message, &json!(["Lab"])),
            ]
            .join(" \r\n"),
        ),
        _ => Act::Nothing,
    })
    .await;
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    assert_eq!(soon(client.list_dbs()).await.unwrap(), ["Lab"]);
    // Once more, so that the answers have arrived.
    soon(client.list_dbs()).await.unwrap();
    let seen = fake.seen.lock().unwrap();
    let answered = |id: &Value| {
        let (_, answer) = seen
            .iter()
            .find(|(_, message)| message["id"] == *id)
            .unwrap();
        answer.clone()
    };
    assert_eq!(
        answered(&json!("e")),
        json!({"id": "e", "result": [{"a": ["}"]}], "error": null})
    );
    assert_eq!(answered(&json!([7]))["error"], "unknown method");
}

const ROW: &str = "6a57a4cb-1a0f-4b0d-9a53-4b7f6f4f7a0e";
const OTHER: &str = "7a57a4cb-1a0f-4b0d-9a53-4b7f6f4f7a0e";
const TRANSACTION: &str = "8a57a4cb-1a0f-4b0d-9a53-4b7f6f4f7a0e";

/// Answers schema and monitor requests, the first contents being one owner named "first" (on the
/// first connection) or "second"; `then` follows the first.
async fn monitored(then: Value) -> Fake {
    Fake::start(
        move |connection, request| match request["method"].as_str() {
            Some("get_schema") => {
                let schema = json!({
                    "name": "Lab",
                    "tables": {"Owner": {"columns": {"name": {"type": "string"}}}},
                });
                Act::Send(answer(request, &schema))
            }
            Some("monitor_cond_since") => {
                let name = if connection == 0 { "first" } else { "second" };
                let contents = json!({"Owner": {ROW: {"initial": {"name": name}}}});
                let mut text = answer(request, &json!([false, TRANSACTION, contents]));
                if connection == 0 {
                    let key = &request["params"][1];
                    let params = json!([key, TRANSACTION, then]);
                    let update = json!({"id": null, "method": "update3", "params": params});
                    text.push_str(&update.to_string());
                }
                Act::Send(text)
            }
            _ => Act::Nothing,
        },
    )
    .await
}

#[rstest]
#[case::a_row_inserted_twice(json!({"Owner": {ROW: {"insert": {"name": "again"}}}}))]
#[case::an_unknown_row_modified(json!({"Owner": {OTHER: {"modify": {"name": "other"}}}}))]
#[case::an_unknown_row_deleted(json!({"Owner": {OTHER: {"delete": null}}}))]
#[case::an_unknown_table(json!({"Stranger": {OTHER: {"insert": {"name": "s"}}}}))]
#[case::an_unknown_column(json!({"Owner": {ROW: {"modify": {"nickname": "s"}}}}))]
#[case::another_type(json!({"Owner": {ROW: {"modify": {"name": 5}}}}))]
#[case::a_map_for_a_set(json!({"Owner": {ROW: {"modify": {"name": ["map", []]}}}}))]
#[case::no_row_update(json!({"Owner": {ROW: {"replace": {"name": "s"}}}}))]
#[case::half_good(json!({"Owner": {
    ROW: {"modify": {"name": "half"}},
    OTHER: {"modify": {"name": "half"}},
}}))]
#[tokio::test]
async fn an_update_that_cannot_be_is_answered_by_starting_over(#[case] update: Value) {
    let fake = monitored(update).await;
    let client = Client::connect(fake.endpoint.clone(), options())
        .await
        .unwrap();
    let replica = Replica::builder(DB)
        .table::<Owner>()
        .start(&client)
        .unwrap();
    let (_, mut changes) = replica.subscribe();
    let mut names = Vec::new();
    while names.last().is_none_or(|name| name != "second") {
        let Some(ovsdb_rs::Event::Changes(set)) = soon(changes.next()).await else {
            panic!("no changes");
        };
        for change in set.of::<Owner>() {
            names.push(change.new.unwrap().name.clone());
        }
    }
    // Nothing of the update was ever visible.
    assert_eq!(names, ["first", "second"]);
    soon(replica.wait_synced()).await.unwrap();
    assert_eq!(replica.rows::<Owner>().len(), 1);
    // And nothing that was built on it is asked for.
    let seen = fake.seen.lock().unwrap();
    let since: Vec<_> = seen
        .iter()
        .filter(|(_, message)| message["method"] == "monitor_cond_since")
        .map(|(_, message)| message["params"][3].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(since, ["00000000-0000-0000-0000-000000000000"; 2]);
}

#[tokio::test]
async fn a_monitor_without_an_answer_moves_on_to_another_connection() {
    let fake = Fake::start(|connection, request| match request["method"].as_str() {
        Some("get_schema") if connection > 0 => Act::Send(answer(
            request,
            &json!({
                "name": "Lab",
                "tables": {"Owner": {"columns": {"name": {"type": "string"}}}},
            }),
        )),
        Some("monitor_cond_since") => Act::Send(answer(request, &json!([false, TRANSACTION, {}]))),
        _ => Act::Nothing,
    })
    .await;
    let eager = ClientOptions {
        monitor_timeout: Duration::from_millis(100),
        ..options()
    };
    let client = Client::connect(fake.endpoint.clone(), eager).await.unwrap();
    let replica = Replica::builder(DB)
        .table::<Owner>()
        .start(&client)
        .unwrap();
    assert_eq!(*replica.sync_state().borrow(), SyncState::Connecting);
    soon(replica.wait_synced()).await.unwrap();
    assert_eq!(fake.count("get_schema"), 2);
}
