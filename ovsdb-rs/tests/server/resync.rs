//! Whatever happens to connections and servers, a replica ends equal to the server's tables, and its
//! changes lead there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use ovsdb_rs::{
    Client, ClientOptions, Condition, ConnectionState, Datum, Error, Event, Mutation, Mutator,
    Origin, Replica, Row, Snapshot, SyncState, Table, Transaction, Where,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use uuid::Uuid;

use crate::lab::{DB, Owner, Part, Server, Thing, connect, options, soon};
use crate::proxy::{From, Proxy};

/// What the writer does.
#[derive(Clone, Debug)]
enum Write {
    Insert(u8),
    Delete(u8),
    Count(u8),
    Tag(u8, u8),
    Label(u8, u8, u8),
    Unlabel(u8, u8),
    Befriend(u8, u8),
    NewPart(u8, i8),
    DropParts(u8),
    Own(u8),
}

#[derive(Clone, Debug)]
enum Act {
    Write(Write),
    Fault,
}

fn write() -> impl Strategy<Value = Write> {
    let thing = 0..12_u8;
    let small = 0..4_u8;
    prop_oneof![
        4 => thing.clone().prop_map(Write::Insert),
        2 => thing.clone().prop_map(Write::Delete),
        2 => thing.clone().prop_map(Write::Count),
        2 => (thing.clone(), small.clone()).prop_map(|(a, b)| Write::Tag(a, b)),
        3 => (thing.clone(), small.clone(), small.clone())
            .prop_map(|(a, b, c)| Write::Label(a, b, c)),
        1 => (thing.clone(), small.clone()).prop_map(|(a, b)| Write::Unlabel(a, b)),
        1 => (thing.clone(), thing.clone()).prop_map(|(a, b)| Write::Befriend(a, b)),
        2 => (thing.clone(), any::<i8>()).prop_map(|(a, b)| Write::NewPart(a, b)),
        1 => thing.clone().prop_map(Write::DropParts),
        1 => thing.prop_map(Write::Own),
    ]
}

fn acts(length: usize) -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        20 => write().prop_map(Act::Write),
        1 => Just(Act::Fault),
    ];
    proptest::collection::vec(act, length)
        // Early enough to have something after it.
        .prop_map(|mut acts| {
            acts.insert(acts.len() / 2, Act::Fault);
            acts
        })
}

impl Write {
    fn transaction(&self) -> Transaction {
        let mut tx = Transaction::new();
        let at = |thing: &u8| Condition::eq("name", format!("thing{thing}"));
        match self {
            Self::Insert(thing) => {
                tx.insert("Thing", Row::new().set("name", format!("thing{thing}")));
            }
            Self::Delete(thing) => {
                tx.delete("Thing", at(thing));
            }
            Self::Count(thing) => {
                tx.mutate(
                    "Thing",
                    at(thing),
                    [Mutation::new("count", Mutator::Add, 1_i64)],
                );
            }
            Self::Tag(thing, tag) => {
                tx.mutate(
                    "Thing",
                    at(thing),
                    [Mutation::insert("tags", format!("tag{tag}"))],
                );
            }
            Self::Label(thing, key, value) => {
                let (key, value) = (format!("key{key}"), format!("value{value}"));
                tx.mutate("Thing", at(thing), Mutation::put("labels", key, value));
            }
            Self::Unlabel(thing, key) => {
                let key = format!("key{key}");
                tx.mutate("Thing", at(thing), [Mutation::delete_keys("labels", [key])]);
            }
            Self::Befriend(thing, other) => {
                let friend = tx.insert("Thing", Row::new().set("name", format!("thing{other}")));
                tx.mutate("Thing", at(thing), [Mutation::insert("friends", friend)]);
            }
            Self::NewPart(thing, serial) => {
                let part = tx.insert("Part", Row::new().set("serial", i64::from(*serial)));
                tx.mutate("Thing", at(thing), [Mutation::insert("parts", part)]);
            }
            Self::DropParts(thing) => {
                tx.update("Thing", at(thing), Row::new().set("parts", Datum::empty()));
            }
            Self::Own(thing) => {
                let owner = tx.insert("Owner", Row::new().set("name", format!("of {thing}")));
                tx.update("Thing", at(thing), Row::new().set("owner", owner));
            }
        }
        tx
    }

    /// Duplicate names and the like are refused, which is as good a history as any.
    async fn execute(&self, client: &Client) {
        match client.transact(DB, self.transaction()).await {
            Ok(_) | Err(Error::Transaction(_) | Error::Indeterminate { .. }) => {}
            Err(error) => panic!("{self:?}: {error:?}"),
        }
    }
}

/// The rows of one table, kept by applying changes.
struct Model<T>(BTreeMap<Uuid, Arc<T>>);

impl<T: Table + std::fmt::Debug> Model<T> {
    fn of(snapshot: &Snapshot) -> Self {
        Self(snapshot.rows::<T>().into_iter().collect())
    }

    fn apply(&mut self, set: &ovsdb_rs::ChangeSet) {
        for change in set.of::<T>() {
            assert_ne!(change.old, change.new, "a change that changes nothing");
            let before = match &change.new {
                Some(row) => self.0.insert(change.uuid, row.clone()),
                None => self.0.remove(&change.uuid),
            };
            assert_eq!(before, change.old, "a change of a row that was not so");
        }
    }

    fn check(&self, snapshot: &Snapshot, server: &BTreeMap<Uuid, T>) {
        let held: BTreeMap<Uuid, Arc<T>> = snapshot.rows::<T>().into_iter().collect();
        assert_eq!(self.0, held, "the changes lead elsewhere than the replica");
        assert_eq!(held.len(), server.len());
        for (uuid, row) in server {
            assert_eq!(
                held.get(uuid).map(|row| &**row),
                Some(row),
                "replica of {uuid}"
            );
        }
    }
}

async fn select<T: Table>(client: &Client) -> BTreeMap<Uuid, T> {
    let mut tx = Transaction::new();
    let select = tx.select(T::NAME, Where::all(), T::COLUMNS.iter().copied());
    let reply = client.transact(DB, tx).await.unwrap();
    reply.rows(select).unwrap().into_iter().collect()
}

/// A replica and what its changes amount to.
struct Observer {
    replica: Replica,
    collector: tokio::task::JoinHandle<(Model<Thing>, Model<Owner>, Model<Part>)>,
}

impl Observer {
    async fn start(client: &Client) -> Self {
        let replica = Replica::builder(DB)
            .table::<Thing>()
            .table::<Owner>()
            .table::<Part>()
            .start(client)
            .unwrap();
        replica.wait_synced().await.unwrap();
        let (first, mut stream) = replica.subscribe();
        let collector = tokio::spawn(async move {
            let mut models = (Model::of(&first), Model::of(&first), Model::of(&first));
            let mut generation = first.generation();
            while !Self::has_marker(&models.1) {
                let set = match soon(stream.next()).await {
                    Some(Event::Changes(set)) => set,
                    other => panic!("{other:?}"),
                };
                generation += 1;
                assert_eq!(set.generation, generation, "a step is missing");
                models.0.apply(&set);
                models.1.apply(&set);
                models.2.apply(&set);
            }
            models
        });
        Self { replica, collector }
    }

    fn has_marker(owners: &Model<Owner>) -> bool {
        owners.0.values().any(|owner| owner.name == "marker")
    }

    /// Compares, after a last write, with what the server says.
    async fn finish(self, writer: &Client) {
        let mut tx = Transaction::new();
        tx.insert("Owner", Row::new().set("name", "marker"));
        writer.transact(DB, tx).await.unwrap();
        let models = soon(self.collector).await.unwrap();
        soon(self.replica.wait_synced()).await.unwrap();
        let snapshot = self.replica.snapshot();
        models.0.check(&snapshot, &select(writer).await);
        models.1.check(&snapshot, &select(writer).await);
        models.2.check(&snapshot, &select(writer).await);
    }
}

fn for_some(cases: u32, length: usize, test: impl AsyncFn(Vec<Act>)) {
    let config = Config {
        cases,
        // Each case starts servers: shrinking would take minutes, the failing acts are printed.
        max_shrink_iters: 0,
        failure_persistence: None,
        ..Config::default()
    };
    let seed = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    TestRunner::new_with_rng(config, seed)
        .run(&acts(length), |acts| {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap()
                .block_on(test(acts));
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_replica_survives_the_death_of_its_server() {
    for_some(2, 120, async |acts| {
        let mut server = Server::start();
        let (watcher, writer) = (connect(server.tcp()).await, connect(server.unix()).await);
        let observer = Observer::start(&watcher).await;
        for act in acts {
            match act {
                Act::Write(write) => write.execute(&writer).await,
                Act::Fault => {
                    // In flight when the server dies.
                    let burst = (0..8_u8).map(|thing| {
                        let writer = writer.clone();
                        tokio::spawn(async move { Write::Count(thing).execute(&writer).await })
                    });
                    let burst: Vec<_> = burst.collect();
                    server = tokio::task::spawn_blocking(move || {
                        server.kill();
                        server.launch();
                        server
                    })
                    .await
                    .unwrap();
                    for write in burst {
                        write.await.unwrap();
                    }
                }
            }
        }
        observer.finish(&writer).await;
    });
}

/// Writes while the observer's connection is cut again and again; what the proxy saw.
async fn through_cuts(
    server: &Server,
    unknown_method: Option<&'static str>,
    acts: Vec<Act>,
) -> Proxy {
    let proxy = Proxy::before(server.unix(), unknown_method).await;
    let (watcher, writer) = (connect(proxy.endpoint()).await, connect(server.tcp()).await);
    let observer = Observer::start(&watcher).await;
    let mut offline = 0;
    for act in acts {
        match act {
            Act::Fault => {
                // For a few writes, so that there is something to catch up with.
                offline = 5;
                proxy.refuse(true);
                proxy.cut();
            }
            Act::Write(write) => {
                write.execute(&writer).await;
                if offline > 0 {
                    offline -= 1;
                    proxy.refuse(offline > 0);
                }
            }
        }
    }
    proxy.refuse(false);
    observer.finish(&writer).await;
    proxy
}

/// The `found` of every reply to `monitor_cond_since`.
fn found(proxy: &Proxy) -> Vec<bool> {
    proxy
        .log()
        .iter()
        .filter(|(from, _)| *from == From::Server)
        .filter_map(|(_, message)| message["result"].get(0)?.as_bool())
        .collect()
}

#[test]
fn a_server_with_a_history_sends_only_what_was_missed() {
    for_some(2, 80, async |acts| {
        let server = Server::start_clustered();
        // A server keeps no more history than its database has contents.
        let mut tx = Transaction::new();
        for number in 0..2000 {
            tx.insert("Owner", Row::new().set("name", format!("ballast{number}")));
        }
        connect(server.unix()).await.transact(DB, tx).await.unwrap();
        let proxy = through_cuts(&server, None, acts).await;
        let found = found(&proxy);
        assert!(found.len() >= 2, "no reconnection");
        assert!(
            !found[0] && found[1..].iter().all(|found| *found),
            "{found:?}"
        );
    });
}

#[test]
fn a_server_without_a_history_sends_everything_again() {
    for_some(2, 80, async |acts| {
        let server = Server::start();
        let proxy = through_cuts(&server, None, acts).await;
        let found = found(&proxy);
        assert!(found.len() >= 2, "no reconnection");
        assert!(found.iter().all(|found| !found), "{found:?}");
        assert!(proxy.count(From::Server, "update3") > 0);
    });
}

#[test]
fn a_server_without_monitor_cond_since_is_asked_for_monitor_cond() {
    for_some(2, 80, async |acts| {
        let server = Server::start_clustered();
        let proxy = through_cuts(&server, Some("monitor_cond_since"), acts).await;
        assert!(proxy.count(From::Client, "monitor_cond") >= 2);
        assert!(proxy.count(From::Server, "update2") > 0);
        assert_eq!(proxy.count(From::Server, "update3"), 0);
    });
}

#[tokio::test]
async fn only_differences_are_reported_after_a_reconnection() {
    let server = Server::start();
    let proxy = Proxy::before(server.unix(), None).await;
    let (watcher, writer) = (connect(proxy.endpoint()).await, connect(server.tcp()).await);
    let mut tx = Transaction::new();
    for name in ["stays", "goes"] {
        tx.insert("Owner", Row::new().set("name", name));
    }
    writer.transact(DB, tx).await.unwrap();
    let replica = Replica::builder(DB)
        .table::<Owner>()
        .start(&watcher)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let (_, mut stream) = replica.subscribe();

    let mut state = replica.sync_state();
    proxy.refuse(true);
    proxy.cut();
    soon(state.wait_for(|state| *state == SyncState::Stale))
        .await
        .unwrap();
    // What it knew is still there to be read.
    assert_eq!(replica.rows::<Owner>().len(), 2);
    let mut tx = Transaction::new();
    tx.delete("Owner", Condition::eq("name", "goes"));
    tx.insert("Owner", Row::new().set("name", "comes"));
    writer.transact(DB, tx).await.unwrap();
    proxy.refuse(false);

    let Some(Event::Changes(set)) = soon(stream.next()).await else {
        panic!("no changes");
    };
    assert_eq!(set.origin, Origin::Resync);
    let mut told: Vec<_> = set
        .of::<Owner>()
        .map(|change| match (change.old, change.new) {
            (None, Some(new)) => format!("+{}", new.name),
            (Some(old), None) => format!("-{}", old.name),
            other => panic!("{other:?}"),
        })
        .collect();
    told.sort();
    assert_eq!(told, ["+comes", "-goes"]);
    soon(state.wait_for(|state| *state == SyncState::Synced))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_frozen_server_is_noticed_and_taken_back() {
    let server = Server::start();
    let eager = ClientOptions {
        probe_interval: Duration::from_millis(200),
        connect_timeout: Duration::from_millis(300),
        call_timeout: Duration::from_secs(1),
        ..options()
    };
    for endpoint in [server.tcp(), server.unix()] {
        let client = Client::connect(endpoint, eager.clone()).await.unwrap();
        let replica = Replica::builder(DB)
            .table::<Owner>()
            .start(&client)
            .unwrap();
        replica.wait_synced().await.unwrap();
        let (mut connection, mut state) = (client.connection_state(), replica.sync_state());

        server.signal(Signal::SIGSTOP);
        let lost =
            soon(connection.wait_for(|state| matches!(state, ConnectionState::Connecting { .. })))
                .await
                .unwrap()
                .clone();
        assert!(format!("{lost:?}").contains("no sign of life"), "{lost:?}");
        assert_eq!(*state.borrow_and_update(), SyncState::Stale);
        // The frozen server's kernel accepts connections; that is no server.
        let mut tx = Transaction::new();
        tx.insert("Owner", Row::new().set("name", "o"));
        let error = client.transact(DB, tx).await.unwrap_err();
        assert!(matches!(error, Error::NotSent { .. }), "{error:?}");

        server.signal(Signal::SIGCONT);
        soon(state.wait_for(|state| *state == SyncState::Synced))
            .await
            .unwrap();
        assert!(
            replica.rows::<Owner>().is_empty(),
            "what was not sent was executed"
        );
    }
}

#[tokio::test]
async fn the_servers_probes_are_answered() {
    let server = Server::start();
    let client = connect(server.unix()).await;
    let target = format!("ptcp:6641:{}", server.address());
    let mut tx = Transaction::new();
    let remote = tx.insert(
        "Remote",
        Row::new()
            .set("target", target)
            .set("inactivity_probe", 50_i64),
    );
    tx.insert("Root", Row::new().set("remotes", remote));
    client.transact(DB, tx).await.unwrap();

    let probing = format!("tcp:{}:6641", server.address()).parse().unwrap();
    let proxy = Proxy::before(probing, None).await;
    // Silent itself.
    let client = Client::connect(
        proxy.endpoint(),
        ClientOptions {
            probe_interval: Duration::from_mins(1),
            ..options()
        },
    )
    .await
    .unwrap();
    let connection = client.connection_state();
    // It probes once a second at most, and hangs up instead of a second time when unanswered.
    soon(proxy.until(|proxy| proxy.count(From::Server, "echo") >= 2)).await;
    assert!(!connection.has_changed().unwrap());
    assert_eq!(client.list_dbs().await.unwrap().len(), 2);
}

#[tokio::test]
async fn another_endpoint_takes_over() {
    let (mut first, second) = (Server::start(), Server::start());
    let endpoints: ovsdb_rs::Endpoints = format!("{},{}", first.unix(), second.tcp())
        .parse()
        .unwrap();
    for (server, name) in [(&first, "first"), (&second, "second")] {
        let mut tx = Transaction::new();
        tx.insert("Owner", Row::new().set("name", name));
        connect(server.unix()).await.transact(DB, tx).await.unwrap();
    }
    let client = Client::connect(endpoints, options()).await.unwrap();
    let replica = Replica::builder(DB)
        .table::<Owner>()
        .start(&client)
        .unwrap();
    replica.wait_synced().await.unwrap();
    let only = |replica: &Replica| {
        let rows = replica.rows::<Owner>();
        assert_eq!(rows.len(), 1);
        rows[0].1.name.clone()
    };
    assert_eq!(only(&replica), "first");
    let mut changed = replica.changed();
    first.kill();
    soon(changed.changed()).await.unwrap();
    assert_eq!(only(&replica), "second");
}
