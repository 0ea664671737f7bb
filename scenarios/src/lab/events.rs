//! What the hypervisors say while a guest migrates.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use libvirt_rpc::{Connection, Happening};
use tokio::{sync::mpsc::UnboundedSender, task::JoinHandle};

use super::{
    host::Host,
    libvirt::{SOCKET, URI},
};

/// The monitor events that are followed. Not that of each pass over a guest's memory, MIGRATION_PASS: the last one comes
/// just before the pause, and to hear it takes processors that the pause needs.
const MONITOR_EVENTS: &str = "^(STOP|RESUME|MIGRATION)$";

/// Something that happened to a domain on a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The node.
    pub host: String,
    /// The domain; empty for [`Kind::Lost`].
    pub domain: String,
    /// When it happened: QEMU's own time, to the microsecond, of a monitor event; for the others, which carry none,
    /// when it was received. This machine's realtime clock in both cases.
    pub at: SystemTime,
    /// When it was received.
    pub received: SystemTime,
    /// What happened.
    pub kind: Kind,
}

/// What happened to a domain.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// libvirt's view.
    Lifecycle(Lifecycle),
    /// An event of QEMU's monitor, by its name there: `STOP`, `RESUME`, `MIGRATION`.
    Monitor {
        /// The event's name.
        name: String,
        /// The event's data, if it has any.
        data: Option<serde_json::Value>,
    },
    /// The connection to this node's libvirt is lost; nothing follows from there.
    Lost(String),
}

/// libvirt's lifecycle events that a migration shows, each with its reason as libvirt names it; the others by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    /// A domain exists: on the target, paused, before anything is copied.
    Started {
        /// It comes from a migration.
        migrated: bool,
    },
    /// A domain is paused: on the source, when the switch-over begins.
    Suspended {
        /// For a migration.
        migrated: bool,
    },
    /// A domain goes on: on the target when it has moved, on the source when the migration failed.
    Resumed {
        /// After a migration, successful or not.
        migrated: bool,
    },
    /// A domain is gone: on the source after the move, on the target when the migration failed.
    Stopped {
        /// It has moved away.
        migrated: bool,
    },
    /// Anything else: `virDomainEventType` and its detail.
    Other(u32, u32),
}

/// Follows a node's events until it is dropped.
#[derive(Debug)]
pub struct Follower(JoinHandle<()>);

// === impl Event ===

impl Event {
    /// Whether it is a monitor event of this name.
    pub fn is_monitor(&self, wanted: &str) -> bool {
        matches!(&self.kind, Kind::Monitor { name, .. } if name == wanted)
    }

    /// The status in a monitor event `MIGRATION`: `active`, `pre-switchover`, `device`, `completed`, `failed`…
    pub fn migration_status(&self) -> Option<&str> {
        match &self.kind {
            Kind::Monitor {
                name,
                data: Some(data),
            } if name == "MIGRATION" => data.get("status")?.as_str(),
            _ => None,
        }
    }
}

// === impl Lifecycle ===

impl Lifecycle {
    /// From `virDomainEventType` and the detail that belongs to it (libvirt-domain.h).
    fn from_numbers(event: u32, detail: u32) -> Self {
        match event {
            2 => Self::Started {
                migrated: detail == 1,
            },
            3 => Self::Suspended {
                migrated: detail == 1,
            },
            4 => Self::Resumed {
                migrated: detail == 1,
            },
            5 => Self::Stopped {
                migrated: detail == 3,
            },
            _ => Self::Other(event, detail),
        }
    }
}

// === impl Follower ===

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Follows the events of all domains of a node. When this returns, the registration is in effect: nothing that happens
/// afterwards is missed. Lifecycle and monitor events come in the order in which libvirt sent them.
///
/// Several nodes can send into one channel. When libvirt goes away, the last event is [`Kind::Lost`].
pub async fn follow(node: &Host, into: UnboundedSender<Event>) -> Result<Follower> {
    let host = node.name().to_owned();
    let mut connection = connect(node)
        .await
        .with_context(|| format!("follow the events of {host}"))?;
    Ok(Follower(tokio::spawn(async move {
        let lost = loop {
            let event = match connection.event().await {
                Ok(event) => event,
                Err(error) => break error.into(),
            };
            match read(&host, event, SystemTime::now()) {
                Ok(event) => {
                    if into.send(event).is_err() {
                        return;
                    }
                }
                Err(error) => break error.context("an event of libvirt"),
            }
        };
        let now = SystemTime::now();
        let kind = Kind::Lost(format!("{lost:#}"));
        // Nobody may be listening any more, which is no error.
        _ = into.send(Event {
            host,
            domain: String::new(),
            at: now,
            received: now,
            kind,
        });
    })))
}

async fn connect(node: &Host) -> Result<Connection, libvirt_rpc::Error> {
    let mut connection = Connection::open(&node.path(SOCKET), URI).await?;
    connection.hear_lifecycle().await?;
    connection.hear_monitors(MONITOR_EVENTS).await?;
    Ok(connection)
}

fn read(host: &str, event: libvirt_rpc::Event, received: SystemTime) -> Result<Event> {
    let (at, kind) = match event.what {
        Happening::Lifecycle { event, detail } => (
            received,
            Kind::Lifecycle(Lifecycle::from_numbers(event, detail)),
        ),
        Happening::Monitor {
            name,
            seconds,
            micros,
            data,
        } => {
            let data = data.map(|text| serde_json::from_str(&text));
            let data = data.transpose().context("data of an event")?;
            let since =
                Duration::from_secs(seconds).checked_add(Duration::from_micros(micros.into()));
            let at = since.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
            (
                at.context("time of an event")?,
                Kind::Monitor { name, data },
            )
        }
    };
    Ok(Event {
        host: host.to_owned(),
        domain: event.domain,
        at,
        received,
        kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(what: Happening) -> Result<Event> {
        let domain = "vm1".to_owned();
        read(
            "node1",
            libvirt_rpc::Event { domain, what },
            SystemTime::UNIX_EPOCH,
        )
    }

    fn migration(data: &str) -> Happening {
        Happening::Monitor {
            name: "MIGRATION".to_owned(),
            seconds: 100,
            micros: 100_000,
            data: Some(data.to_owned()),
        }
    }

    #[test]
    fn a_monitor_event_has_qemus_own_time() {
        let event = told(migration(r#"{"status":"active"}"#)).unwrap();
        assert_eq!(event.domain, "vm1");
        assert_eq!(event.migration_status(), Some("active"));
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(100_100);
        assert_eq!(event.at, at);
    }

    #[test]
    fn data_that_is_no_json_is_an_error() {
        assert!(told(migration("active")).is_err());
    }

    #[test]
    fn a_resume_after_a_migration_is_told_from_one_by_a_person() {
        for (detail, migrated) in [(1, true), (0, false)] {
            let event = told(Happening::Lifecycle { event: 4, detail }).unwrap();
            assert_eq!(event.kind, Kind::Lifecycle(Lifecycle::Resumed { migrated }));
        }
    }
}
