//! Open vSwitch's own database: followed, and which interfaces it has for which logical ports.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ovsdb_rs::{Client, ClientOptions, Endpoints, Replica, ReplicaBuilder, Snapshot, SyncState};
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

/// The database's name (ovs-vswitchd.conf.db(5)).
pub const DATABASE: &str = "Open_vSwitch";

/// Where ovs-vswitchd's users put the name of the logical port that an interface is (ovn-controller(8)).
pub const IFACE_ID: &str = "iface-id";

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

/// Tables of Open vSwitch's database, followed for a view of them.
#[derive(Debug)]
pub struct Follower {
    client: Client,
    replica: Replica,
}

impl Follower {
    /// Connects in the background, and again whenever the connection is lost.
    ///
    /// # Errors
    /// [`Error::Follow`].
    pub fn start(endpoints: Endpoints, tables: ReplicaBuilder) -> Result<Self, Error> {
        let client = Client::spawn(endpoints, ClientOptions::default());
        let replica = tables
            .start(&client)
            .map_err(|error| Error::Follow(Box::new(error)))?;
        Ok(Self { client, replica })
    }

    /// Whether the tables are known and followed, now and later.
    pub fn state(&self) -> watch::Receiver<SyncState> {
        self.replica.sync_state()
    }

    /// Keeps `out` equal to the view of the tables, from when they are known until nobody listens, and wakes those who
    /// listen when it `differs` (the known first, the new second). While the database is away the last one stays.
    pub async fn follow<V>(
        self,
        out: watch::Sender<V>,
        mut view: impl FnMut(&Snapshot) -> V,
        differs: impl Fn(&V, &V) -> bool,
    ) {
        let mut state = self.replica.sync_state();
        let (_, mut steps) = self.replica.subscribe();
        loop {
            if self.replica.is_synced() {
                let now = view(&self.replica.snapshot());
                out.send_if_modified(|known| {
                    let matters = differs(known, &now);
                    *known = now;
                    matters
                });
            }
            tokio::select! {
                () = out.closed() => break,
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

/// The names of the interfaces whose `external_ids:iface-id` is wanted.
#[derive(Debug)]
pub(crate) struct IfaceIds {
    follower: Follower,
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
        let tables = Replica::builder(DATABASE).table::<Interface>();
        Ok(Self {
            follower: Follower::start(endpoints, tables)?,
            patterns,
        })
    }

    /// Tells the names whenever they change, and none before they are known, until nobody listens. While the database
    /// is away the last known ones stay.
    pub(crate) async fn follow(self, names: watch::Sender<Option<BTreeSet<String>>>) {
        let patterns = self.patterns;
        let view = |snapshot: &Snapshot| Some(wanted(snapshot, &patterns));
        self.follower
            .follow(names, view, |known, now| known != now)
            .await;
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
