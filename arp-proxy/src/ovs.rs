//! Which interfaces Open vSwitch has for which logical ports.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ovsdb_rs::{Client, ClientOptions, Endpoints, Replica, Snapshot, SyncState};
use thiserror::Error;
use tokio::sync::watch;

use crate::select::Patterns;

ovsdb_rs::table! {
    /// Open_vSwitch's interfaces.
    struct Interface in "Interface" {
        name: String,
        external_ids: BTreeMap<String, String>,
    }
}

/// Where ovs-vswitchd's users put the name of the logical port that an interface is (ovn-controller(8)).
const IFACE_ID: &str = "iface-id";

/// Open vSwitch's database cannot be followed.
#[derive(Debug, Error)]
pub enum Error {
    /// Its address is no path.
    #[error("{path:?} is no path of a Unix socket")]
    Path {
        /// What was given.
        path: String,
        /// Why not.
        source: Box<ovsdb_rs::Error>,
    },
    /// The client refuses.
    #[error("cannot follow the database Open_vSwitch")]
    Follow(#[source] Box<ovsdb_rs::Error>),
}

/// The names of the interfaces whose `external_ids:iface-id` is wanted.
#[derive(Debug)]
pub(crate) struct IfaceIds {
    client: Client,
    replica: Replica,
    patterns: Patterns,
}

impl IfaceIds {
    /// Connects in the background, and again whenever the connection is lost.
    pub(crate) fn start(socket: &Path, patterns: Patterns) -> Result<Self, Error> {
        let path = socket.display().to_string();
        let endpoints: Endpoints =
            format!("unix:{path}")
                .parse()
                .map_err(|source| Error::Path {
                    path,
                    source: Box::new(source),
                })?;
        let client = Client::spawn(endpoints, ClientOptions::default());
        let replica = Replica::builder("Open_vSwitch")
            .table::<Interface>()
            .start(&client)
            .map_err(|error| Error::Follow(Box::new(error)))?;
        Ok(Self {
            client,
            replica,
            patterns,
        })
    }

    /// Tells the names whenever they change, and none before they are known, until nobody listens. While the database
    /// is away the last known ones stay.
    pub(crate) async fn follow(self, names: watch::Sender<Option<BTreeSet<String>>>) {
        let mut state = self.replica.sync_state();
        let (_, mut steps) = self.replica.subscribe();
        loop {
            if self.replica.is_synced() {
                let wanted = wanted(&self.replica.snapshot(), &self.patterns);
                names.send_if_modified(|known| {
                    let differs = known.as_ref() != Some(&wanted);
                    *known = Some(wanted);
                    differs
                });
            }
            tokio::select! {
                () = names.closed() => break,
                Ok(()) = state.changed() => {
                    let now = state.borrow_and_update().clone();
                    if now == SyncState::Synced {
                        tracing::info!("following Open vSwitch's interfaces");
                    } else {
                        tracing::warn!(state = ?now, "not following Open vSwitch; its interfaces stay as last known");
                    }
                }
                // What a step changed is in the snapshot; the stream tells that there was one.
                step = steps.next() => if step.is_none() {
                    break;
                },
            }
        }
        drop(self.client);
    }
}

fn wanted(snapshot: &Snapshot, patterns: &Patterns) -> BTreeSet<String> {
    snapshot
        .iter::<Interface>()
        .filter(|(_, interface)| {
            interface
                .external_ids
                .get(IFACE_ID)
                .is_some_and(|id| patterns.include(id))
        })
        .map(|(_, interface)| interface.name.clone())
        .collect()
}
