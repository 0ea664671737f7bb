//! The interfaces that Open vSwitch has for logical ports, as they come, go and change.

mod view;

use std::collections::BTreeMap;
use std::sync::Arc;

use arp_proxy::Mac;
use arp_proxy::ovs::{DATABASE, Follower};
use ovsdb_rs::{Endpoints, Replica, SyncState};
use thiserror::Error;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use self::view::View;

/// An interface of the integration bridge that is a logical port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name, which is the network device's where there is one.
    pub name: String,
    /// OpenFlow's number for it; none while the switch has not opened it, or cannot.
    pub ofport: Option<u32>,
    /// ovn-controller has programmed all of the port's flows: `external_ids:ovn-installed` (ovn-controller(8)).
    pub installed: bool,
    /// Why the switch could not open it.
    pub error: Option<String>,
    /// The Ethernet address of the interface itself, not of the machine behind it.
    pub mac_in_use: Option<Mac>,
    /// As of the last time that ovs-vswitchd wrote them, every 5 s unless `other_config:stats-update-interval` says
    /// otherwise.
    pub statistics: Statistics,
    /// It is a tap: what comes in by it a hypervisor has written. By others comes what the kernel of a pod sends, too.
    pub is_tap: bool,
}

/// Counters of an interface, from the switch's side: received is what the machine has sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packets from the machine.
    pub rx_packets: u64,
    /// Packets from the machine that were dropped.
    pub rx_dropped: u64,
    /// Packets to the machine.
    pub tx_packets: u64,
    /// Packets to the machine that were dropped: a full queue of a tap counts here.
    pub tx_dropped: u64,
}

/// Interfaces by `external_ids:iface-id`, which is the logical port's name.
pub type Interfaces = BTreeMap<String, Interface>;

/// Follows the interfaces of a bridge, until it is dropped.
///
/// # Guarantees
/// - Only interfaces of the named bridge: a port's OpenFlow number means nothing on another.
/// - The database's address may be out of order for as long as it likes: it is tried again, and meanwhile the interfaces
///   stay as they were known last.
/// - Who waits for a change is woken when an interface comes, goes, or changes in anything but its statistics. These are
///   up to date whenever somebody looks.
///
/// # Two interfaces of the same logical port
/// ovn-controller takes one: the first by its port's and its own row's UUID when it looks at all of them, the one that
/// came last when it follows changes (`build_local_bindings` and `consider_iface_claim` in OVN's controller/binding.c).
/// Its choice shows in `ovn-installed`, so the one that has it is taken here; among equals one that has an OpenFlow
/// number, then the first by UUID. A warning names all of them.
#[derive(Debug)]
pub struct Ports {
    interfaces: watch::Receiver<Arc<Interfaces>>,
    state: watch::Receiver<SyncState>,
    task: AbortHandle,
}

/// The interfaces cannot be followed.
#[derive(Debug, Error)]
pub enum Error {
    /// No address of a database.
    #[error("{remote:?} is no address of Open vSwitch's database: unix:PATH is usual")]
    Remote {
        /// What was given.
        remote: String,
        /// Why not.
        source: Box<ovsdb_rs::Error>,
    },
    /// The client refuses.
    #[error(transparent)]
    Follow(#[from] arp_proxy::ovs::Error),
}

impl Ports {
    /// Begins to follow the bridge's interfaces in the database at `remote`, such as `unix:/run/openvswitch/db.sock`.
    ///
    /// # Errors
    /// [`Error::Remote`]; a database that is not there is waited for.
    pub fn connect(remote: &str, bridge: &str) -> Result<Self, Error> {
        let endpoints: Endpoints = remote.parse().map_err(|source| Error::Remote {
            remote: remote.to_owned(),
            source: Box::new(source),
        })?;
        let tables = Replica::builder(DATABASE)
            .table::<view::Bridge>()
            .table::<view::Port>()
            .table::<view::Row>();
        let follower = Follower::start(endpoints, tables)?;
        let state = follower.state();
        let (sender, interfaces) = watch::channel(Arc::default());
        let mut view = View::new(bridge);
        let following = follower.follow(
            sender,
            move |snapshot| Arc::new(view.of(snapshot)),
            |known, now| differ(known, now),
        );
        let task = tokio::spawn(following).abort_handle();
        Ok(Self {
            interfaces,
            state,
            task,
        })
    }

    /// The interfaces, now and later; none before they are known.
    pub fn interfaces(&self) -> watch::Receiver<Arc<Interfaces>> {
        self.interfaces.clone()
    }

    /// The interface of a logical port, as last known.
    pub fn get(&self, iface_id: &str) -> Option<Interface> {
        self.interfaces.borrow().get(iface_id).cloned()
    }

    /// Whether the database is followed at this moment.
    pub fn is_synced(&self) -> bool {
        *self.state.borrow() == SyncState::Synced
    }

    /// How it stands with the database, now and later.
    pub fn state(&self) -> watch::Receiver<SyncState> {
        self.state.clone()
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether anybody has to know.
fn differ(known: &Interfaces, now: &Interfaces) -> bool {
    let same = |(known, now): (&Interface, &Interface)| {
        // All but the statistics, whatever is added to an interface.
        *known
            == Interface {
                statistics: known.statistics,
                ..now.clone()
            }
    };
    !(known.keys().eq(now.keys()) && known.values().zip(now.values()).all(same))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(change: impl FnOnce(&mut Interface)) -> Interfaces {
        let mut interface = Interface {
            name: "tap0".to_owned(),
            ofport: Some(1),
            ..Interface::default()
        };
        change(&mut interface);
        BTreeMap::from([("vm".to_owned(), interface)])
    }

    #[test]
    fn statistics_wake_nobody() {
        let before = one(|_| {});
        assert!(!differ(
            &before,
            &one(|interface| interface.statistics.rx_packets = 7)
        ));
        assert!(differ(
            &before,
            &one(|interface| interface.ofport = Some(2))
        ));
        assert!(differ(
            &before,
            &one(|interface| interface.installed = true)
        ));
        assert!(differ(&before, &one(|interface| interface.name.push('0'))));
        assert!(differ(&before, &Interfaces::new()));
        let renamed = BTreeMap::from([("other".to_owned(), before["vm"].clone())]);
        assert!(differ(&before, &renamed));
    }

    #[test]
    fn a_remote_that_is_none_is_named() {
        let error = Ports::connect("/run/openvswitch/db.sock", "br-int").unwrap_err();
        assert!(error.to_string().contains("/run/openvswitch/db.sock"));
    }
}
