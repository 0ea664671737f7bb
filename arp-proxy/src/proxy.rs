//! The proxy: watches the interfaces that are wanted, and answers on them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::answer::{Tag, announcements, host_announcements};
use crate::limiter::Limits;
use crate::links::{self, LinkEvent};
use crate::metrics::Metrics;
use crate::ovs::{self, IfaceIds};
use crate::port::{Port, Shared};
use crate::select::{Patterns, Selection};
use crate::socket;
use crate::{Gateway, GatewayError, Mac, chain};

/// Events of interfaces that may be waiting; the kernel's own queue is behind.
const EVENTS: usize = 256;
/// How often an interface that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// What to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whom to answer for.
    pub gateway: Gateway,
    /// Interfaces by name.
    pub interfaces: Patterns,
    /// Interfaces by the logical port that Open vSwitch has them for (`external_ids:iface-id`).
    pub iface_ids: Patterns,
    /// Open vSwitch's database; not opened when there are no `iface_ids`.
    pub ovsdb: PathBuf,
    /// How often a source is answered.
    pub limits: Limits,
}

/// A proxy that runs; dropped, it stops at once.
///
/// # Guarantees
/// - Interfaces are those of the network namespace that it was started in, and no others.
/// - What comes is watched as soon as the kernel tells; what goes leaves nothing behind.
///
/// # Caveats
/// - Runs on the tokio runtime that it was started on, which must have I/O and time enabled.
/// - Interfaces other than Ethernet are passed over, whatever their names.
#[derive(Debug)]
pub struct Proxy {
    metrics: Arc<Metrics>,
    state: watch::Receiver<State>,
    commands: mpsc::Sender<Command>,
    tasks: JoinSet<()>,
}

/// How far a proxy is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The kernel has told which interfaces there are.
    pub listed: bool,
    /// Open vSwitch has told which are wanted, or need not.
    pub ovs_known: bool,
    /// The interfaces that are watched.
    pub watched: BTreeSet<String>,
}

/// A proxy cannot start.
#[derive(Debug, Error)]
pub enum StartError {
    /// It would never watch anything.
    #[error("no interface is wanted: name some, by pattern or by iface-id")]
    NothingWanted,
    /// Not allowed, most likely.
    #[error("cannot open a packet socket (it takes CAP_NET_RAW)")]
    Socket(#[source] io::Error),
    /// Open vSwitch's database.
    #[error(transparent)]
    Ovs(#[from] ovs::Error),
}

/// The gateway was not announced.
#[derive(Debug, Error)]
pub enum AnnounceError {
    /// The interface is not there, or not wanted.
    #[error(
        "interface {0} is not watched: it is not there (yet), or no --interface or --iface-id includes it"
    )]
    NotWatched(String),
    /// The kernel did not take the frames.
    #[error("cannot send on {interface}{}", if *.down { "; it is down" } else { "" })]
    Send {
        /// The interface.
        interface: String,
        /// It is down, which may pass.
        down: bool,
        /// The system's answer.
        source: io::Error,
    },
    /// The proxy has stopped.
    #[error("the proxy has stopped")]
    Stopped,
}

#[derive(Debug)]
struct Command {
    interface: String,
    tag: Option<Tag>,
    done: oneshot::Sender<Result<(), AnnounceError>>,
}

impl Proxy {
    /// Starts one.
    ///
    /// # Errors
    /// What cannot get better by waiting. A database or an interface that is not there is waited for.
    pub fn start(config: Config) -> Result<Self, StartError> {
        if config.interfaces.is_empty() && config.iface_ids.is_empty() {
            return Err(StartError::NothingWanted);
        }
        socket::permitted().map_err(StartError::Socket)?;
        let mut tasks = JoinSet::new();
        let uses_ovs = !config.iface_ids.is_empty();
        let (names, ovs) = watch::channel((!uses_ovs).then(BTreeSet::new));
        if uses_ovs {
            let ids = IfaceIds::start(&config.ovsdb, config.iface_ids)?;
            tasks.spawn(ids.follow(names));
        }
        let (events_in, events) = mpsc::channel(EVENTS);
        let (commands, commands_out) = mpsc::channel(1);
        let (state_in, state) = watch::channel(State::default());
        let metrics = Arc::new(Metrics::new());
        let shared = Arc::new(Shared {
            gateway: config.gateway,
            limits: config.limits,
            metrics: metrics.clone(),
        });
        let selection = Selection {
            names: config.interfaces,
            from_ovs: BTreeSet::new(),
        };
        tasks.spawn(links::follow(events_in));
        let keeper = Keeper {
            shared,
            selection,
            links: BTreeMap::new(),
            ports: BTreeMap::new(),
            failing: BTreeSet::new(),
            state: state_in,
        };
        tasks.spawn(keeper.run(events, ovs, commands_out));
        Ok(Self {
            metrics,
            state,
            commands,
            tasks,
        })
    }

    /// What it has counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// How far it is, now and later.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// For those who announce.
    pub fn announcer(&self) -> Announcer {
        Announcer(self.commands.clone())
    }

    /// Resolves when a part of it has ended, which none does by itself.
    pub async fn failed(&mut self) {
        self.tasks.join_next().await;
    }

    /// Ends it. Its sockets are closed as soon as the runtime has let go of the tasks that read them.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Announces the gateway on watched interfaces.
#[derive(Clone, Debug)]
pub struct Announcer(mpsc::Sender<Command>);

impl Announcer {
    /// Sends the [announcements] on a watched interface, in a VLAN if `tag` says so.
    ///
    /// # Errors
    /// Nothing, or not everything, was sent; doing it again does no harm.
    pub async fn announce(&self, interface: &str, tag: Option<Tag>) -> Result<(), AnnounceError> {
        let (done, outcome) = oneshot::channel();
        let command = Command {
            interface: interface.to_owned(),
            tag,
            done,
        };
        self.0
            .send(command)
            .await
            .map_err(|_| AnnounceError::Stopped)?;
        outcome.await.map_err(|_| AnnounceError::Stopped)?
    }
}

/// Sends the [announcements] on an interface of this network namespace, without a proxy there.
///
/// # Errors
/// Nothing, or not everything, was sent: the interface is not there or is down, or `CAP_NET_RAW` is missing.
pub fn announce_once(gateway: &Gateway, interface: &str, tag: Option<Tag>) -> io::Result<()> {
    socket::send_once(interface, &announcements(gateway, tag))
}

/// A host was not announced.
#[derive(Debug, Error)]
pub enum HostError {
    /// No host has such addresses.
    #[error("cannot announce a host")]
    Host(#[from] GatewayError),
    /// The kernel did not take the frames.
    #[error("cannot send on {interface} (it takes CAP_NET_RAW, and the interface up)")]
    Send {
        /// The interface.
        interface: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// Sends the [host's announcements](host_announcements) on an interface of this network namespace: those who hear them
/// are at its other end.
///
/// # Errors
/// Nothing, or not everything, was sent; doing it again does no harm.
pub fn announce_host(
    mac: Mac,
    addresses: &[IpAddr],
    interface: &str,
    tag: Option<Tag>,
) -> Result<(), HostError> {
    let frames = host_announcements(mac, addresses, tag)?;
    socket::send_once(interface, &frames).map_err(|source| HostError::Send {
        interface: interface.to_owned(),
        source,
    })
}

/// Keeps what is watched in line with what is there and what is wanted.
struct Keeper {
    shared: Arc<Shared>,
    selection: Selection,
    /// All Ethernet interfaces, by index.
    links: BTreeMap<u32, String>,
    ports: BTreeMap<u32, Port>,
    /// Indexes of those that could not be opened, so that it is said once.
    failing: BTreeSet<u32>,
    state: watch::Sender<State>,
}

impl Keeper {
    async fn run(
        mut self,
        mut events: mpsc::Receiver<LinkEvent>,
        mut ovs: watch::Receiver<Option<BTreeSet<String>>>,
        mut commands: mpsc::Receiver<Command>,
    ) {
        let mut retry = interval(RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.select(ovs.borrow_and_update().clone());
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => if !self.learn(event) {
                        continue;
                    },
                    None => return,
                },
                // Without Open vSwitch its sender is gone from the start, and stays so.
                Ok(()) = ovs.changed() => {
                    self.select(ovs.borrow_and_update().clone());
                }
                Some(command) = commands.recv() => {
                    let outcome = self.announce(&command.interface, command.tag);
                    // Who asked may have gone away.
                    let _ = command.done.send(outcome);
                    continue;
                }
                _ = retry.tick() => {}
            }
            self.reconcile();
        }
    }

    /// Whether it was news: the kernel tells of much that does not matter, and looking at everything costs.
    fn learn(&mut self, event: LinkEvent) -> bool {
        match event {
            LinkEvent::Listed(links) => {
                self.links = links
                    .into_iter()
                    .map(|link| (link.index, link.name))
                    .collect();
                self.state.send_modify(|state| state.listed = true);
                true
            }
            LinkEvent::Changed(link) => {
                let name = link.name.clone();
                self.links.insert(link.index, link.name).as_ref() != Some(&name)
            }
            LinkEvent::Gone(index) => self.links.remove(&index).is_some(),
        }
    }

    fn select(&mut self, from_ovs: Option<BTreeSet<String>>) {
        if let Some(names) = from_ovs {
            self.selection.from_ovs = names;
            self.state.send_modify(|state| state.ovs_known = true);
        }
    }

    fn reconcile(&mut self) {
        let (links, selection) = (&self.links, &self.selection);
        self.ports.retain(|index, port| {
            let name = links.get(index).filter(|name| selection.includes(name));
            if let Some(name) = name.filter(|_| !port.has_ended()) {
                port.rename(name);
                true
            } else {
                tracing::info!(interface = port.name(), "not watching it any longer");
                false
            }
        });
        self.failing.retain(|index| links.contains_key(index));
        let missing: Vec<_> = links
            .iter()
            .filter(|(index, name)| !self.ports.contains_key(index) && selection.includes(name))
            .map(|(index, name)| (*index, name.clone()))
            .collect();
        for (index, name) in missing {
            self.open(index, &name);
        }
        self.publish();
    }

    fn open(&mut self, index: u32, name: &str) {
        match Port::open(index, name, &self.shared) {
            Ok(port) => {
                tracing::info!(interface = name, index, "watching it");
                self.failing.remove(&index);
                self.ports.insert(index, port);
            }
            // It went away again, which the kernel will tell.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => {
                if self.failing.insert(index) {
                    tracing::warn!(interface = name, error = %chain(&error), "cannot watch it; trying again");
                }
            }
        }
    }

    fn publish(&self) {
        let watched: BTreeSet<String> = self
            .ports
            .values()
            .map(|port| port.name().to_owned())
            .collect();
        self.shared.metrics.watched(watched.len());
        self.state.send_if_modified(|state| {
            let changed = state.watched != watched;
            state.watched = watched;
            changed
        });
    }

    fn announce(&self, interface: &str, tag: Option<Tag>) -> Result<(), AnnounceError> {
        let port = self
            .ports
            .values()
            .find(|port| port.name() == interface)
            .ok_or_else(|| AnnounceError::NotWatched(interface.to_owned()))?;
        for frame in announcements(&self.shared.gateway, tag) {
            port.send(&frame).map_err(|source| AnnounceError::Send {
                interface: interface.to_owned(),
                down: source.kind() == io::ErrorKind::NetworkDown,
                source,
            })?;
        }
        self.shared.metrics.announced();
        tracing::info!(interface, "announced the gateway");
        Ok(())
    }
}
