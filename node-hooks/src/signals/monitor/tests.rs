//! With a daemon's end of the socket in a test's hands.

use rstest::rstest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;
use crate::signals::Sign;
use crate::signals::lifecycle::Domains;

const MESSAGE: u32 = 2;
const REPLY: u32 = 1;
const OK: u32 = 0;
const ERROR: u32 = 1;

/// XDR, and libvirt's header before it.
fn frame(program: u32, number: u32, kind: u32, serial: u32, status: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(28 + body.len()).unwrap();
    let header = [length, program, 1, number, kind, serial, status];
    let header = header.into_iter().flat_map(u32::to_be_bytes);
    header.chain(body.iter().copied()).collect()
}

fn string(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap();
    let mut bytes = [&length.to_be_bytes()[..], text.as_bytes()].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An event of the monitor of `default_web`, at 5.000007 s.
pub(crate) fn event(name: &str, data: Option<&str>) -> Vec<u8> {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect();
    let parts: [Vec<u8>; 6] = [
        words(&[1]),
        string("default_web"),
        words(&[0; 5]),
        string(name),
        words(&[0, 5, 7]),
        data.map_or_else(|| words(&[0]), |data| [words(&[1]), string(data)].concat()),
    ];
    frame(0x2000_8087, 6, MESSAGE, 0, OK, &parts.concat())
}

pub(crate) fn reply(serial: u32) -> Vec<u8> {
    frame(0x2000_8086, 0, REPLY, serial, OK, &[])
}

async fn connect(said: &[Vec<u8>]) -> (Result<Passed<DuplexStream>, SourceError>, DuplexStream) {
    let (ours, mut daemon) = tokio::io::duplex(1 << 16);
    daemon.write_all(&said.concat()).await.unwrap();
    (Passed::over(ours, "qemu:///session", None).await, daemon)
}

#[tokio::test]
async fn a_pause_is_told_with_qemus_own_stamp() {
    let active = event("MIGRATION", Some(r#"{"status":"active"}"#));
    let said = [reply(1), reply(2), active, event("STOP", None)];
    let (passed, mut daemon) = connect(&said).await;
    let mut passed = passed.unwrap();
    let begins = passed.next().await.unwrap();
    assert_eq!(begins.change, Change::Incoming);
    let happened = passed.next().await.unwrap();
    assert_eq!(happened.domain, "default_web");
    assert_eq!(happened.change, Change::Suspended { migrating: true });
    assert_eq!(happened.at, Nanos(5_000_007_000));
    drop(passed);
    let mut asked = Vec::new();
    daemon.read_to_end(&mut asked).await.unwrap();
    let asked = String::from_utf8_lossy(&asked).into_owned();
    assert!(asked.contains("qemu:///session"), "{asked:?}");
    assert!(asked.contains(EVENTS), "{asked:?}");
}

#[tokio::test]
async fn a_daemon_that_refuses_says_why() {
    let forbidden = [
        &29_u32.to_be_bytes()[..],
        &[0; 4],
        &[0, 0, 0, 1],
        &string("read only"),
    ];
    let refusal = frame(0x2000_8087, 4, REPLY, 2, ERROR, &forbidden.concat());
    let (passed, _daemon) = connect(&[reply(1), refusal]).await;
    let error = arp_proxy::chain(&passed.unwrap_err());
    assert!(error.contains("--libvirt-read-only"), "{error}");
    assert!(error.ends_with("libvirt: read only"), "{error}");
}

#[tokio::test]
async fn a_daemon_that_ends_or_talks_nonsense_is_an_error() {
    for (last, expected) in [
        (&b""[..], "ended: libvirt closed the connection"),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "does not pass on QEMU's events",
        ),
    ] {
        let said = [reply(1), reply(2), last.to_vec()];
        let (passed, daemon) = connect(&said).await;
        drop(daemon);
        let error = passed.unwrap().next().await.unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[rstest]
#[case::it_leaves(&["active", "STOP", "device", "completed"], &[Sign::Paused])]
#[case::it_cannot_leave(
    &["active", "STOP", "pre-switchover", "failed", "RESUME"],
    &[Sign::Paused, Sign::ResumedAfterFailure]
)]
#[case::it_comes(&["setup", "active", "completed", "RESUME"], &[Sign::Resumed])]
#[case::it_comes_before_its_memory_does(&["active", "postcopy-active", "RESUME"], &[Sign::Resumed])]
#[case::it_comes_and_is_paused_by_a_person(
    &["active", "completed", "RESUME", "STOP", "RESUME"],
    &[Sign::Resumed]
)]
#[case::it_comes_and_leaves(
    &["active", "completed", "RESUME", "active", "STOP"],
    &[Sign::Resumed, Sign::Paused]
)]
#[case::a_person_pauses_it(&["STOP", "RESUME"], &[])]
#[case::its_migration_began_unheard(&["STOP", "device", "completed"], &[])]
#[case::its_migration_is_cancelled(&["active", "cancelling", "cancelled", "STOP", "RESUME"], &[])]
#[case::it_leaves_and_comes_back(
    &["active", "STOP", "completed", "setup", "active", "completed", "RESUME"],
    &[Sign::Paused, Sign::Resumed]
)]
#[case::it_fails_and_leaves_then(
    &["active", "STOP", "failed", "RESUME", "active", "STOP"],
    &[Sign::Paused, Sign::ResumedAfterFailure, Sign::Paused]
)]
#[case::it_is_shut_down(&["active", "SHUTDOWN", "STOP"], &[])]
#[case::its_disk_fails(&["active", "BLOCK_IO_ERROR", "STOP", "RESUME"], &[])]
fn signs(#[case] events: &[&str], #[case] expected: &[Sign]) {
    let (mut guests, mut domains) = (Guests::default(), Domains::default());
    let signs = events.iter().filter_map(|event| {
        let change = if event.chars().all(|c| c.is_ascii_uppercase()) {
            guests.change("default_web", event, None)
        } else {
            let data = format!(r#"{{"status":"{event}"}}"#);
            guests.change("default_web", "MIGRATION", Some(&data))
        };
        domains.sign("default_web", change?)
    });
    assert_eq!(signs.collect::<Vec<_>>(), expected);
}

#[test]
fn one_guests_migration_is_not_anothers_and_nonsense_is_none() {
    let mut guests = Guests::default();
    guests.change("a", "MIGRATION", Some(r#"{"status":"active"}"#));
    assert_eq!(guests.change("b", "STOP", None), None);
    for data in [None, Some("{"), Some("[]"), Some(r#"{"status":7}"#)] {
        guests.change("a", "MIGRATION", data);
    }
    let paused = Change::Suspended { migrating: true };
    assert_eq!(guests.change("a", "STOP", None), Some(paused));
}

#[test]
fn memory_is_bounded() {
    let mut guests = Guests::default();
    for number in 0..MOST + 10 {
        guests.change(
            &number.to_string(),
            "MIGRATION",
            Some(r#"{"status":"active"}"#),
        );
    }
    assert_eq!(guests.0.len(), MOST);
    guests.change("0", "MIGRATION", Some(r#"{"status":"completed"}"#));
    guests.change("new", "MIGRATION", Some(r#"{"status":"active"}"#));
    let paused = Change::Suspended { migrating: true };
    assert_eq!(
        guests.change("new", "STOP", None),
        Some(paused),
        "one has left"
    );
}

#[tokio::test(start_paused = true)]
async fn a_launcher_that_floods_is_slowed_down() {
    let mut said = vec![
        reply(1),
        reply(2),
        event("MIGRATION", Some(r#"{"status":"active"}"#)),
    ];
    said.extend((0..200).map(|_| event("STOP", None)));
    let (ours, mut daemon) = tokio::io::duplex(1 << 16);
    daemon.write_all(&said.concat()).await.unwrap();
    let began = Instant::now();
    let pace = Some(Pace::new(began));
    let mut passed = Passed::over(ours, "qemu:///session", pace).await.unwrap();
    for _ in 0..32 {
        passed.next().await.unwrap();
    }
    assert_eq!(began.elapsed(), Duration::ZERO, "a few at once");
    for _ in 32..200 {
        passed.next().await.unwrap();
    }
    assert!(
        began.elapsed() > Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
}

#[rstest]
#[case("qemu:///system", Some(("qemu:///system", &SYSTEM[..])))]
#[case("qemu+unix:///system", Some(("qemu:///system", &SYSTEM[..])))]
#[case("qemu+unix:///system?socket=/run/a/sock", Some(("qemu:///system", &["/run/a/sock"][..])))]
#[case("qemu+unix:///session?mode=direct&socket=/run/a/sock", Some(("qemu:///session", &["/run/a/sock"][..])))]
#[case::whose_home_is_not_known("qemu:///session", None)]
#[case::encoded("qemu+unix:///system?socket=/run/a%20b/sock", None)]
#[case::of_another_host("qemu+ssh:///system", None)]
#[case::of_another_host("qemu://host/system", None)]
#[case::of_another_driver("test:///default", None)]
#[case::no_uri("system", None)]
fn sockets(#[case] uri: &str, #[case] expected: Option<(&str, &[&str])>) {
    let found = local(uri).map(|door| match door.sockets {
        Sockets::Known(paths) => (door.uri, paths),
        Sockets::Found(socket) => panic!("{socket} is not known"),
    });
    let expected = expected.map(|(uri, paths)| {
        let paths = paths.iter().map(PathBuf::from).collect();
        (uri.to_owned(), paths)
    });
    assert_eq!(found, expected);
}

#[tokio::test]
async fn the_first_socket_that_is_there_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let _listener = tokio::net::UnixListener::bind(path("b")).unwrap();
    first(&[path("a"), path("b")]).await.unwrap();
    let error = first(&[path("a")]).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains(&path("a").display().to_string()), "{error}");
}
