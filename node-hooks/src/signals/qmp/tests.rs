//! With a monitor's other end in a test's hands.

use futures::{SinkExt as _, StreamExt as _};
use rstest::rstest;
use tokio::io::DuplexStream;
use tokio_util::codec::{Framed, LinesCodec};

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}"#;

/// A QEMU that answers as it is told to.
struct Qemu {
    stream: Framed<DuplexStream, LinesCodec>,
    run_state: &'static str,
    migration: Option<&'static str>,
    has_events: bool,
    counts: Arc<Counts>,
}

impl Qemu {
    fn new() -> (DuplexStream, Self) {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let qemu = Self {
            stream: Framed::new(theirs, LinesCodec::new()),
            run_state: "running",
            migration: None,
            has_events: true,
            counts: Arc::default(),
        };
        (ours, qemu)
    }

    async fn say(&mut self, line: impl Into<String>) {
        self.stream.send(line.into()).await.unwrap();
    }

    async fn event(&mut self, name: &str, data: Value) {
        let event = json!({
            "event": name, "data": data,
            "timestamp": {"seconds": 1_788_256_805, "microseconds": 123_456},
        });
        self.say(event.to_string()).await;
    }

    async fn migration(&mut self, status: &str) {
        self.event("MIGRATION", json!({"status": status})).await;
    }

    /// Answers the next command.
    async fn answer(&mut self) -> String {
        let request = self.stream.next().await.expect("a command").unwrap();
        let request: Value = serde_json::from_str(&request).unwrap();
        let command = request["execute"].as_str().unwrap().to_owned();
        let reply = match command.as_str() {
            "migrate-set-capabilities" if !self.has_events => {
                let error = json!({"class": "GenericError", "desc": "There's a migration process in progress"});
                self.say(json!({"error": error, "id": request["id"]}).to_string())
                    .await;
                return command;
            }
            "query-name" => json!({"name": "default_web"}),
            "query-status" => json!({"status": self.run_state, "running": false}),
            "query-migrate" => self
                .migration
                .map_or(json!({}), |status| json!({"status": status})),
            _ => json!({}),
        };
        self.say(json!({"return": reply, "id": request["id"]}).to_string())
            .await;
        command
    }

    /// Greets, and answers what is asked before there are events.
    async fn open(&mut self, stream: DuplexStream) -> Monitor<DuplexStream> {
        self.say(GREETING).await;
        let counts = self.counts.clone();
        let negotiation = async {
            for expected in [
                "qmp_capabilities",
                "migrate-set-capabilities",
                "query-name",
                "query-status",
                "query-migrate",
            ] {
                assert_eq!(self.answer().await, expected);
            }
        };
        let (monitor, ()) = tokio::join!(Monitor::open(stream, counts), negotiation);
        monitor.unwrap()
    }
}

async fn changes(monitor: &mut Monitor<DuplexStream>, count: usize) -> Vec<Change> {
    let mut changes = Vec::new();
    for _ in 0..count {
        changes.push(monitor.next().await.unwrap().change);
    }
    changes
}

const PAUSED: Change = Change::Suspended { migrating: true };

#[tokio::test(start_paused = true)]
async fn a_guest_that_leaves_is_told_at_once_and_with_qemus_stamp() {
    let (stream, mut qemu) = Qemu::new();
    let mut monitor = qemu.open(stream).await;
    for status in ["setup", "active"] {
        qemu.migration(status).await;
    }
    qemu.event("STOP", json!({})).await;
    // Nobody answers a question now.
    let happened = monitor.next().await.unwrap();
    assert_eq!(happened.domain, "default_web");
    assert_eq!(happened.change, PAUSED);
    assert_eq!(happened.at, Nanos(1_788_256_805_123_456_000));
    for status in ["device", "completed"] {
        qemu.migration(status).await;
    }
    drop(qemu);
    assert_eq!(
        changes(&mut monitor, 1).await,
        [Change::Stopped { migrated: true }]
    );
    assert!(matches!(monitor.next().await, Err(SourceError::Ended(_))));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_cannot_leave_runs_on() {
    let (stream, mut qemu) = Qemu::new();
    let mut monitor = qemu.open(stream).await;
    qemu.migration("active").await;
    qemu.event("STOP", json!({})).await;
    qemu.migration("failed").await;
    qemu.event("RESUME", json!({})).await;
    let expected = [PAUSED, Change::Resumed { migrated: false }];
    assert_eq!(changes(&mut monitor, 2).await, expected);
    drop(qemu);
    assert!(matches!(monitor.next().await, Err(SourceError::Ended(_))));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_comes() {
    let (stream, mut qemu) = Qemu::new();
    qemu.run_state = "inmigrate";
    let mut monitor = qemu.open(stream).await;
    for status in ["setup", "active", "completed"] {
        qemu.migration(status).await;
    }
    qemu.event("RESUME", json!({})).await;
    assert_eq!(
        changes(&mut monitor, 1).await,
        [Change::Resumed { migrated: true }]
    );
    // It stays where it is, whatever its migration's status was last.
    qemu.run_state = "paused";
    qemu.event("STOP", json!({})).await;
    let (changed, command) = tokio::join!(changes(&mut monitor, 1), qemu.answer());
    assert_eq!(command, "query-status");
    assert_eq!(changed, [Change::Suspended { migrating: false }]);
    qemu.event("RESUME", json!({})).await;
    assert_eq!(
        changes(&mut monitor, 1).await,
        [Change::Resumed { migrated: false }]
    );
}

#[rstest]
#[case("finish-migrate", true)]
#[case("postmigrate", true)]
#[case("paused", false)]
#[case("io-error", false)]
#[tokio::test(start_paused = true)]
async fn without_events_the_run_state_says_why(
    #[case] run_state: &'static str,
    #[case] migrating: bool,
) {
    let (stream, mut qemu) = Qemu::new();
    qemu.has_events = false;
    let mut monitor = qemu.open(stream).await;
    qemu.run_state = run_state;
    qemu.event("STOP", json!({})).await;
    let (changed, _) = tokio::join!(changes(&mut monitor, 1), qemu.answer());
    assert_eq!(changed, [Change::Suspended { migrating }]);
}

#[tokio::test(start_paused = true)]
async fn a_migration_that_is_under_way_when_it_connects() {
    let (stream, mut qemu) = Qemu::new();
    qemu.migration = Some("active");
    qemu.has_events = false;
    let mut monitor = qemu.open(stream).await;
    qemu.event("STOP", json!({})).await;
    assert_eq!(changes(&mut monitor, 1).await, [PAUSED]);
}

/// What came here once is complete for good: that says nothing of a pause.
#[tokio::test(start_paused = true)]
async fn a_migration_that_is_over_when_it_connects() {
    let (stream, mut qemu) = Qemu::new();
    qemu.migration = Some("completed");
    let mut monitor = qemu.open(stream).await;
    qemu.run_state = "paused";
    qemu.event("STOP", json!({})).await;
    let (changed, _) = tokio::join!(changes(&mut monitor, 1), qemu.answer());
    assert_eq!(changed, [Change::Suspended { migrating: false }]);
}

#[tokio::test(start_paused = true)]
async fn events_between_a_command_and_its_reply_keep_their_order() {
    let (stream, mut qemu) = Qemu::new();
    let mut monitor = qemu.open(stream).await;
    // STOP is asked about; what follows it comes before the answer.
    qemu.event("STOP", json!({})).await;
    qemu.event("RESUME", json!({})).await;
    qemu.say(r#"{"return": {}, "id": "somebody else's"}"#).await;
    let (changed, _) = tokio::join!(changes(&mut monitor, 2), qemu.answer());
    let expected = [
        Change::Suspended { migrating: false },
        Change::Resumed { migrated: false },
    ];
    assert_eq!(changed, expected);
}

#[tokio::test(start_paused = true)]
async fn nonsense_is_counted_and_passed_over() {
    let (stream, mut qemu) = Qemu::new();
    let mut monitor = qemu.open(stream).await;

    qemu.say("{").await;
    qemu.say("[".repeat(1000)).await;
    qemu.say(r#"{"event": 7}"#).await;
    qemu.say("x".repeat(100_000)).await;
    qemu.event("NEVER_HEARD_OF", json!({"deep": [[[]]]})).await;
    qemu.say(r#"{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}"#)
        .await;
    qemu.run_state = "paused";
    let before = Nanos::now();
    let (happened, _) = tokio::join!(monitor.next(), qemu.answer());
    assert!(
        happened.unwrap().at >= before,
        "no time is the time it was read"
    );
    assert_eq!(
        qemu.counts
            .malformed
            .load(std::sync::atomic::Ordering::Relaxed),
        4
    );
}

#[tokio::test(start_paused = true)]
async fn one_that_says_nothing_is_given_up() {
    let (stream, qemu) = Qemu::new();
    let error = Monitor::open(stream, Arc::default()).await.err().unwrap();
    assert!(matches!(error, SourceError::Deadline(_)), "{error}");
    drop(qemu);
    let (stream, mut qemu) = Qemu::new();
    qemu.say(GREETING).await;
    let error = Monitor::open(stream, Arc::default()).await.err().unwrap();
    assert!(matches!(error, SourceError::Deadline(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn one_that_is_no_monitor_is_given_up() {
    for line in [r#"{"return": {}}"#, "SSH-2.0-OpenSSH", ""] {
        let (stream, mut qemu) = Qemu::new();
        qemu.say(line).await;
        drop(qemu);
        let error = Monitor::open(stream, Arc::default()).await.err().unwrap();
        assert!(
            matches!(error, SourceError::Qmp(_) | SourceError::Ended(_)),
            "{error}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_without_a_name_is_nobodys() {
    let (stream, mut qemu) = Qemu::new();
    let nameless = async {
        qemu.say(GREETING).await;
        qemu.answer().await;
        qemu.answer().await;
        let request: Value =
            serde_json::from_str(&qemu.stream.next().await.unwrap().unwrap()).unwrap();
        qemu.say(json!({"return": {}, "id": request["id"]}).to_string())
            .await;
    };
    let (monitor, ()) = tokio::join!(Monitor::open(stream, Arc::default()), nameless);
    let error = monitor.err().unwrap().to_string();
    assert!(error.contains("-name"), "{error}");
}
