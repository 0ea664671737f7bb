//! What the hypervisors say while a guest migrates.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use tokio::{sync::mpsc::UnboundedSender, task::JoinHandle};

use super::{
    host::Host,
    libvirt::{SOCKET, URI},
    rpc::{Connection, Decoder, Encoder, Message, Procedure, QEMU, REMOTE},
};

const LIFECYCLE_REGISTER: Procedure = (REMOTE, 316);
const LIFECYCLE: Procedure = (REMOTE, 318);
const MONITOR_REGISTER: Procedure = (QEMU, 4);
const MONITOR: Procedure = (QEMU, 6);

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
    /// An event of QEMU's monitor, by its name there: `STOP`, `RESUME`, `MIGRATION`…
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
            let message = match connection.message().await {
                Ok(message) => message,
                Err(error) => break error,
            };
            match read(&host, &message, SystemTime::now()) {
                Ok(Some(event)) => {
                    if into.send(event).is_err() {
                        return;
                    }
                }
                Ok(None) => {}
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

async fn connect(node: &Host) -> Result<Connection> {
    let mut connection = Connection::open(&node.path(SOCKET), URI).await?;
    // Lifecycle events have number 0; no domain means every domain.
    connection
        .call(LIFECYCLE_REGISTER, Encoder::default().word(0).word(0))
        .await?;
    // No domain, no event name, no flags: every event of every domain.
    connection
        .call(
            MONITOR_REGISTER,
            Encoder::default().word(0).optional(None).word(0),
        )
        .await?;
    Ok(connection)
}

/// Reads an event; messages of other kinds are none.
fn read(host: &str, message: &Message, received: SystemTime) -> Result<Option<Event>> {
    let mut body = Decoder::new(&message.body);
    if !matches!(message.procedure, LIFECYCLE | MONITOR) {
        return Ok(None);
    }
    let _callback = body.word()?;
    let domain = body.string()?;
    let _uuid = body.bytes(16)?;
    let _id = body.word()?;
    let (at, kind) = if message.procedure == LIFECYCLE {
        (
            received,
            Kind::Lifecycle(Lifecycle::from_numbers(body.word()?, body.word()?)),
        )
    } else {
        let name = body.string()?;
        let (seconds, micros) = (body.long()?, body.word()?);
        let data = body
            .optional()?
            .map(|text| serde_json::from_str(&text))
            .transpose()
            .context("data of an event")?;
        let at = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .and_then(|at| at.checked_add(Duration::from_micros(micros.into())))
            .context("time of an event")?;
        (at, Kind::Monitor { name, data })
    };
    Ok(Some(Event {
        host: host.to_owned(),
        domain,
        at,
        received,
        kind,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        digits
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    const DOMAIN: &str = "00000001 00000003 766d3100 11111111222233334444555555555555 00000007";

    #[test]
    fn a_monitor_event_has_qemus_own_time() {
        let body = hex(&format!(
            "{DOMAIN} 00000009 4d4947524154494f 4e000000 00000000 00000064 000186a0 \
             00000001 00000013 7b22737461747573223a226163 74697665227d 00"
        ));
        let message = Message {
            procedure: MONITOR,
            body,
        };
        let event = read("node1", &message, SystemTime::now()).unwrap().unwrap();
        assert_eq!(event.domain, "vm1");
        assert_eq!(event.migration_status(), Some("active"));
        assert_eq!(
            event.at,
            SystemTime::UNIX_EPOCH + Duration::from_millis(100_100)
        );
    }

    #[test]
    fn a_resume_after_a_migration_is_told_from_one_by_a_person() {
        for (detail, migrated) in [("00000001", true), ("00000000", false)] {
            let message = Message {
                procedure: LIFECYCLE,
                body: hex(&format!("{DOMAIN} 00000004 {detail}")),
            };
            let event = read("node2", &message, SystemTime::UNIX_EPOCH)
                .unwrap()
                .unwrap();
            assert_eq!(event.kind, Kind::Lifecycle(Lifecycle::Resumed { migrated }));
        }
    }

    #[test]
    fn truncated_events_are_errors_and_unknown_ones_are_left_out() {
        let message = Message {
            procedure: LIFECYCLE,
            body: hex(DOMAIN),
        };
        assert!(read("node1", &message, SystemTime::now()).is_err());
        let message = Message {
            procedure: (REMOTE, 1),
            body: Vec::new(),
        };
        assert_eq!(read("node1", &message, SystemTime::now()).unwrap(), None);
    }
}
