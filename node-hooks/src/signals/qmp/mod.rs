//! Lifecycle events of a QEMU that runs without libvirt, by its monitor (QMP).
//!
//! STOP does not say why the guest stands still. While a migration is under way, which events MIGRATION tell, it is to
//! be the migration, and that is told at once: QEMU answers no question as long as it copies the rest of the guest. Where
//! those events are not to be had, the run state says it, later: `finish-migrate` and `postmigrate` belong to a migration
//! (qapi/run-state.json). A guest that a person pauses in the middle of a migration is told as paused too; when it goes
//! on it is told as running here.

mod client;

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use crate::time::Nanos;

use super::Counts;
use super::follow::{Connection, Hypervisor, SourceError};
use super::lifecycle::{Change, Happened, Status};
use super::sockets::SocketFile;
use client::{Client, Event};

/// A monitor's socket.
#[derive(Debug)]
pub(super) struct Qmp {
    pub(super) socket: SocketFile,
    pub(super) counts: Arc<Counts>,
}

/// A monitor that tells events.
#[derive(Debug)]
pub(super) struct Monitor<S> {
    client: Client<S>,
    domain: String,
    migration: Migration,
}

/// What is known of a migration of this guest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Migration {
    /// The guest is to come here.
    incoming: bool,
    /// As MIGRATION said last.
    status: Option<Status>,
    /// The guest was stopped for it.
    paused: bool,
}

// === impl Qmp ===

impl Hypervisor for Qmp {
    type Connection = Monitor<UnixStream>;

    async fn connect(&self) -> Result<Self::Connection, SourceError> {
        let stream = self.socket.connect().await.map_err(SourceError::reaching)?;
        Monitor::open(stream, self.counts.clone()).await
    }
}

// === impl Monitor ===

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Monitor<S> {
    async fn open(stream: S, counts: Arc<Counts>) -> Result<Self, SourceError> {
        let mut client = Client::negotiate(stream, counts).await?;
        let capability = json!({"capabilities": [{"capability": "events", "state": true}]});
        // Refused while a migration is under way; then STOP is asked about.
        if let Err(error @ SourceError::Qmp(_)) =
            client.execute("migrate-set-capabilities", capability).await
        {
            tracing::debug!(%error, "no MIGRATION events");
        }
        let name = client.execute("query-name", json!({})).await?;
        let Some(domain) = text(&name, "name") else {
            let why = "the guest has no name; start QEMU with -name".to_owned();
            return Err(SourceError::Qmp(why));
        };
        let domain = domain.to_owned();
        let state = client.execute("query-status", json!({})).await?;
        let status = client.execute("query-migrate", json!({})).await?;
        let state = text(&state, "status");
        let migration = Migration {
            incoming: state == Some("inmigrate"),
            // That of a guest that came here stays completed for good.
            status: text(&status, "status")
                .map(Status::from)
                .filter(|&status| status == Status::UnderWay),
            paused: is_of_a_migration(state),
        };
        Ok(Self {
            client,
            domain,
            migration,
        })
    }

    async fn change(&mut self, event: &Event) -> Result<Option<Change>, SourceError> {
        Ok(match event.name.as_str() {
            "STOP" => {
                let migrating = self.migration.status == Some(Status::UnderWay)
                    || is_of_a_migration(text(
                        &self.client.execute("query-status", json!({})).await?,
                        "status",
                    ));
                self.migration.paused = migrating;
                Some(Change::Suspended { migrating })
            }
            "RESUME" => {
                let migrated = std::mem::take(&mut self.migration).incoming;
                Some(Change::Resumed { migrated })
            }
            "MIGRATION" => {
                self.migration.status = event
                    .data
                    .as_ref()
                    .and_then(|data| text(data, "status"))
                    .map(Status::from);
                None
            }
            _ => None,
        })
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Connection for Monitor<S> {
    async fn next(&mut self) -> Result<Happened, SourceError> {
        loop {
            let event = match self.client.event().await {
                Ok(event) => event,
                Err(error) => return self.ended(error),
            };
            let seen = Nanos::now();
            if let Some(change) = self.change(&event).await? {
                return Ok(Happened {
                    domain: self.domain.clone(),
                    change,
                    at: event.at.unwrap_or(seen),
                    seen,
                });
            }
        }
    }
}

impl<S> Monitor<S> {
    /// A QEMU that ends after all was copied has been left by its guest.
    fn ended(&mut self, error: SourceError) -> Result<Happened, SourceError> {
        let migration = std::mem::take(&mut self.migration);
        if !(migration.paused && migration.status == Some(Status::Completed)) {
            return Err(error);
        }
        let now = Nanos::now();
        Ok(Happened {
            domain: self.domain.clone(),
            change: Change::Stopped { migrated: true },
            at: now,
            seen: now,
        })
    }
}

fn is_of_a_migration(run_state: Option<&str>) -> bool {
    matches!(run_state, Some("finish-migrate" | "postmigrate"))
}

fn text<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get(key)?.as_str()
}

#[cfg(test)]
mod tests;
