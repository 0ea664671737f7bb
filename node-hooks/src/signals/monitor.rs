//! Events of QEMU's monitors that libvirt passes on.
//!
//! libvirt tells of a pause when it has written it down, synced to its disk (`qemuProcessHandleStop` and
//! `qemuDomainSaveStatus` in src/qemu/qemu_process.c). The monitor's own event it passes on before it does anything about
//! it, and with QEMU's own stamp. So here a pause is heard of first, and the lifecycle event confirms it.
//!
//! STOP does not say why the guest stands still. While a migration is under way, which events MIGRATION tell, it is to be
//! the migration; one whose beginning was not heard, and one in which something else may have stopped the guest, is left
//! to the lifecycle events. A guest that a person pauses in the middle of a migration is told as paused too; when it goes
//! on it is told as running here, and for the rest of this migration libvirt's and KubeVirt's word counts.
//!
//! libvirt wants a connection that may write for these events. Nothing else is called on it.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use libvirt_rpc::{Connection as Rpc, Event, Happening};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until, timeout};

use crate::ear::Pace;
use crate::time::Nanos;

use super::follow::{Connection, Hypervisor, SourceError};
use super::lifecycle::{Change, Happened, MOST, Status};
use super::sockets::SocketFile;
use super::virsh::Daemon;

/// A daemon that has just been started with its launcher may be slow; one that is stopped never answers.
const DEADLINE: Duration = Duration::from_secs(10);
/// The events that are of use here.
const EVENTS: &str = "^(STOP|RESUME|MIGRATION|SHUTDOWN|BLOCK_IO_ERROR|WATCHDOG|GUEST_PANICKED)$";
/// Where the host's own daemon has its socket, the one for QEMU alone and the one for all drivers (`libvirtd(8)`).
const SYSTEM: [&str; 2] = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];

/// The monitors behind a libvirt daemon.
#[derive(Debug)]
pub(super) struct Monitors(Door);

/// How the daemon is reached, and the URI of the driver behind it.
#[derive(Debug)]
struct Door {
    sockets: Sockets,
    uri: String,
}

#[derive(Debug)]
enum Sockets {
    Found(SocketFile),
    /// The first of these that is there.
    Known(Vec<PathBuf>),
}

/// A daemon that passes on monitors' events.
#[derive(Debug)]
pub(super) struct Passed<S> {
    rpc: Rpc<S>,
    guests: Guests,
    /// Of a launcher's daemon, which may have been taken over: all that is heard passes one thread.
    pace: Option<Pace>,
}

/// How the migrations of its guests stand, as MIGRATION said last: those that are under way, or came to a good end.
#[derive(Debug, Default)]
struct Guests(BTreeMap<String, Status>);

/// The data of MIGRATION.
#[derive(Deserialize)]
struct Migration<'a> {
    status: &'a str,
}

// === impl Monitors ===

impl Monitors {
    /// Those behind a daemon; none where it is not one of QEMU's that this host has a socket of.
    pub(super) fn behind(daemon: &Daemon) -> Option<Self> {
        let door = match daemon {
            Daemon::Socket(socket) => Door {
                uri: format!("qemu:///{}", socket.driver_path()),
                sockets: Sockets::Found(socket.clone()),
            },
            Daemon::Uri(uri) => local(uri)?,
        };
        Some(Self(door))
    }
}

impl Hypervisor for Monitors {
    type Connection = Passed<UnixStream>;

    async fn connect(&self) -> Result<Self::Connection, SourceError> {
        let connecting = async {
            let (stream, pace) = match &self.0.sockets {
                Sockets::Found(socket) => {
                    let stream = socket.connect().await.map_err(SourceError::reaching)?;
                    (stream, Some(Pace::new(Instant::now())))
                }
                Sockets::Known(paths) => (first(paths).await?, None),
            };
            Passed::over(stream, &self.0.uri, pace).await
        };
        let connected = timeout(DEADLINE, connecting).await;
        connected.map_err(|_late| SourceError::Deadline(DEADLINE))?
    }
}

/// The socket behind a URI (`https://libvirt.org/uri.html`), where that is on this host and its path is plain.
fn local(uri: &str) -> Option<Door> {
    let (scheme, rest) = uri.split_once(":///")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if !matches!(scheme, "qemu" | "qemu+unix") || query.contains('%') {
        return None;
    }
    let mut parameters = query.split('&');
    let sockets = match parameters.find_map(|parameter| parameter.strip_prefix("socket=")) {
        Some(socket) => vec![PathBuf::from(socket)],
        None if path == "system" => SYSTEM.map(PathBuf::from).to_vec(),
        None => return None,
    };
    Some(Door {
        sockets: Sockets::Known(sockets),
        uri: format!("qemu:///{path}"),
    })
}

async fn first(paths: &[PathBuf]) -> Result<UnixStream, SourceError> {
    let mut failed = None;
    for path in paths {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            // What is said is why the last of those that are there cannot be reached.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed = Some(error),
        }
    }
    Err(match failed {
        Some(error) => SourceError::Io(error),
        None => SourceError::NoSocket(paths.to_vec()),
    })
}

// === impl Passed ===

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Passed<S> {
    async fn over(stream: S, uri: &str, pace: Option<Pace>) -> Result<Self, SourceError> {
        let mut rpc = Rpc::over(stream, uri).await?;
        rpc.hear_monitors(EVENTS).await?;
        Ok(Self {
            rpc,
            guests: Guests::default(),
            pace,
        })
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Connection for Passed<S> {
    async fn next(&mut self) -> Result<Happened, SourceError> {
        loop {
            if let Some(pace) = &self.pace {
                sleep_until(pace.pause()).await;
            }
            let Event { domain, what } = self.rpc.event().await?;
            if let Some(pace) = &mut self.pace {
                pace.take(Instant::now());
            }
            let seen = Nanos::now();
            let Happening::Monitor {
                name,
                seconds,
                micros,
                data,
            } = what
            else {
                continue;
            };
            if let Some(change) = self.guests.change(&domain, &name, data.as_deref()) {
                let stamp = micros.checked_mul(1000);
                return Ok(Happened {
                    domain,
                    change,
                    at: stamp
                        .and_then(|nanos| Nanos::from_parts(seconds, nanos))
                        .unwrap_or(seen),
                    seen,
                });
            }
        }
    }
}

// === impl Guests ===

impl Guests {
    fn change(&mut self, domain: &str, event: &str, data: Option<&str>) -> Option<Change> {
        match event {
            "STOP" => (self.0.get(domain) == Some(&Status::UnderWay))
                .then_some(Change::Suspended { migrating: true }),
            "RESUME" => {
                let migrated = self.0.remove(domain).is_some();
                Some(Change::Resumed { migrated })
            }
            "MIGRATION" => {
                let status = serde_json::from_str::<Migration<'_>>(data?).ok()?.status;
                self.stands(domain, status.into())
            }
            // What stops a guest that migrates as well as one that does not, or may.
            _ => {
                self.0.remove(domain);
                None
            }
        }
    }

    fn stands(&mut self, domain: &str, status: Status) -> Option<Change> {
        let before = self.0.get(domain).copied();
        if status == Status::Other {
            self.0.remove(domain);
            return None;
        }
        if before.is_none() && self.0.len() >= MOST {
            // Those that have left are of no use any more.
            self.0.retain(|_, status| *status == Status::UnderWay);
        }
        if before.is_some() || self.0.len() < MOST {
            self.0.insert(domain.to_owned(), status);
        }
        // What was before is over.
        let begins = status == Status::UnderWay && before != Some(Status::UnderWay);
        begins.then_some(Change::Incoming)
    }
}

#[cfg(test)]
pub(super) mod tests;
