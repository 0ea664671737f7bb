use ovsdb_rs::{Error, ErrorKind, Lock, LockState, Row, Transaction};

use crate::lab::{DB, Server, connect, soon};
use crate::proxy::Proxy;

async fn becomes(lock: &Lock, wanted: LockState) {
    soon(lock.state().wait_for(|state| *state == wanted))
        .await
        .unwrap();
}

fn guarded_by(lock: &str) -> Transaction {
    let mut tx = Transaction::new();
    tx.assert_lock(lock);
    tx.insert("Owner", Row::new().set("name", "o"));
    tx
}

#[tokio::test]
async fn a_lock_is_held_by_one_and_passed_on_in_order() {
    let server = Server::start();
    let (one, two) = (connect(server.tcp()).await, connect(server.unix()).await);
    let first = one.lock("leader").await.unwrap();
    let second = two.lock("leader").await.unwrap();
    assert!(first.is_held());
    assert_eq!(*second.state().borrow(), LockState::Waiting);
    one.transact(DB, guarded_by("leader")).await.unwrap();
    let error = two.transact(DB, guarded_by("leader")).await.unwrap_err();
    assert_eq!(error.as_transaction().unwrap().kind, ErrorKind::NotOwner);

    first.unlock().await.unwrap();
    becomes(&second, LockState::Held).await;
    two.transact(DB, guarded_by("leader")).await.unwrap();
    let error = one.transact(DB, guarded_by("leader")).await.unwrap_err();
    assert_eq!(error.as_transaction().unwrap().kind, ErrorKind::NotOwner);
}

#[tokio::test]
async fn a_dropped_lock_is_given_up() {
    let server = Server::start();
    let (one, two) = (connect(server.tcp()).await, connect(server.tcp()).await);
    let first = one.lock("leader").await.unwrap();
    let second = two.lock("leader").await.unwrap();
    drop(first);
    becomes(&second, LockState::Held).await;
    // At the end of the queue again.
    let again = one.lock("leader").await.unwrap();
    assert_eq!(*again.state().borrow(), LockState::Waiting);
}

#[tokio::test]
async fn a_stolen_lock_comes_back_when_the_thief_is_done() {
    let server = Server::start();
    let (victim, thief) = (connect(server.tcp()).await, connect(server.tcp()).await);
    let owned = victim.lock("leader").await.unwrap();
    let stolen = thief.steal("leader").await.unwrap();
    assert!(stolen.is_held());
    becomes(&owned, LockState::Stolen).await;
    let error = victim.transact(DB, guarded_by("leader")).await.unwrap_err();
    assert_eq!(error.as_transaction().unwrap().kind, ErrorKind::NotOwner);

    stolen.unlock().await.unwrap();
    becomes(&owned, LockState::Held).await;
    victim.transact(DB, guarded_by("leader")).await.unwrap();
}

#[tokio::test]
async fn a_client_queues_once_for_a_lock() {
    let server = Server::start();
    let client = connect(server.tcp()).await;
    let lock = client.lock("leader").await.unwrap();
    let error = client.lock("leader").await.unwrap_err();
    assert!(matches!(error, Error::LockInUse), "{error:?}");
    assert!(lock.is_held());
    let error = client.lock("not an id").await.unwrap_err();
    assert!(
        matches!(error, Error::Rpc { method: "lock", .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_lock_is_requested_again_after_a_reconnection() {
    let server = Server::start();
    let proxy = Proxy::before(server.unix(), None).await;
    let (client, other) = (connect(proxy.endpoint()).await, connect(server.tcp()).await);
    let lock = client.lock("leader").await.unwrap();
    let next = other.lock("leader").await.unwrap();

    proxy.refuse(true);
    proxy.cut();
    becomes(&lock, LockState::Disconnected).await;
    becomes(&next, LockState::Held).await;
    proxy.refuse(false);
    becomes(&lock, LockState::Waiting).await;
    next.unlock().await.unwrap();
    becomes(&lock, LockState::Held).await;
    client.transact(DB, guarded_by("leader")).await.unwrap();
}
