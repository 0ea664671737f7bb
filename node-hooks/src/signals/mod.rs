//! What the hypervisors on this node say of their guests' coming and going.
//!
//! Each hypervisor is listened to on its own: a libvirt daemon through a child `virsh event` and, for what QEMU's monitor
//! tells behind it, over a connection of this process; a QEMU without libvirt through its monitor. Daemons that come and go with their guests, as KubeVirt's launchers bring theirs, are found by
//! the paths of their sockets.
//!
//! # Guarantees
//! - Nothing that a hypervisor says, and nothing that it leaves out, ends the listening to it or to others.
//! - A guest's signs come in the order in which its hypervisor told what they stand for.
//! - Nothing is changed through libvirt. virsh's connection to it is read-only; the other one has to be one that may
//!   write, as libvirt asks for that, and calls nothing but its registration ([`Config::read_only`] does without it).
//! - A connection is ended with the process that holds it.
//!
//! # Caveats
//! - What happens while there is no connection is not told later. After it, a guest that runs again where it could not
//!   leave may be told as [`Sign::Resumed`] if the pause was among what was missed.
//! - A launcher that was taken over can lie about one guest of its choice: see [`Config::sockets`].

mod follow;
mod lifecycle;
mod lines;
mod monitor;
mod qmp;
mod sockets;
mod virsh;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::time::Nanos;

pub use sockets::{PathPattern, PathPatternError};
pub use watch::watch;

/// What a guest's hypervisor saw it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sign {
    /// It was paused so that it can go on elsewhere: it is about to leave.
    Paused,
    /// It runs here, where it has come to.
    Resumed,
    /// Its domain is gone from here because it runs elsewhere.
    Left,
    /// It runs here again: it was to leave and could not.
    ResumedAfterFailure,
}

/// Through what a sign was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// libvirt's lifecycle events.
    Libvirt,
    /// QEMU's monitor, its own socket or passed on by libvirt.
    Qmp,
}

/// A sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LifecycleEvent {
    /// The domain's name, `<namespace>_<name>` in KubeVirt. Not more than its hypervisor's word.
    pub domain: String,
    /// The sign.
    pub sign: Sign,
    /// Through what.
    pub origin: Origin,
    /// When it happened: QEMU's own stamp, to the microsecond; of libvirt's events, which carry none, when `virsh`
    /// received them, cut to the millisecond. Never later than `seen`.
    pub at: Nanos,
    /// When this process had read it.
    pub seen: Nanos,
}

/// What to listen to.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where libvirt daemons that run one guest each have their sockets. Of what such a daemon says only the guest that
    /// it names first is believed.
    pub sockets: Vec<PathPattern>,
    /// Daemons that are always there, such as `qemu:///system`.
    pub connect_uris: Vec<String>,
    /// Where QEMUs without libvirt have sockets of monitors that nobody else uses: a monitor serves one client.
    pub qmp: Vec<PathPattern>,
    /// The program `virsh`.
    pub virsh: PathBuf,
    /// Do without the events of QEMU's monitors that libvirt passes on.
    pub read_only: bool,
    /// What is counted.
    pub counts: Arc<Counts>,
}

/// What is counted of the listening.
#[derive(Debug, Default)]
pub struct Counts {
    /// Hypervisors that are being listened to now.
    pub connected: AtomicU64,
    /// Libvirt daemons that pass on the events of QEMU's monitors.
    pub monitors: AtomicU64,
    /// Connections made.
    pub connections: AtomicU64,
    /// Lines that were no events as they should be.
    pub malformed: AtomicU64,
    /// Events of a domain that is not its daemon's.
    pub disbelieved: AtomicU64,
}

impl Default for Config {
    /// Nothing to listen to, with the `virsh` that is found.
    fn default() -> Self {
        Self {
            sockets: Vec::new(),
            connect_uris: Vec::new(),
            qmp: Vec::new(),
            virsh: PathBuf::from("virsh"),
            read_only: false,
            counts: Arc::default(),
        }
    }
}
