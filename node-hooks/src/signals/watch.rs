//! Which hypervisors there are to listen to.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::{Id, JoinSet};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::follow::{Counted, Domain, Follower, State};
use super::lifecycle::Domains;
use super::monitor::Monitors;
use super::qmp::Qmp;
use super::sockets::{SocketFile, SocketId, find};
use super::virsh::{Daemon, Virsh};
use super::{Config, LifecycleEvent, Origin, PathPattern};

/// How often it is looked for new sockets. A launcher is there for seconds before its guest can migrate; inotify says
/// nothing of /proc. One look costs three system calls a process.
const RESCAN: Duration = Duration::from_secs(2);
/// Children that may be starting at once.
const STARTING: usize = 4;
/// Followers at once, two for each libvirt daemon: a child of virsh has some two megabytes of its own.
const MOST: usize = 2048;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Uri(String, Feed),
    Libvirt(SocketId, Feed),
    Qmp(SocketId),
}

/// What a libvirt daemon is listened to for, each over a connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Feed {
    Lifecycle,
    Monitors,
}

struct Watch {
    config: Config,
    events: mpsc::Sender<LifecycleEvent>,
    starting: Arc<Semaphore>,
    followers: Followers,
    /// The guest that each launcher's daemon is believed of: of both its feeds the same.
    guests: HashMap<SocketId, Arc<OnceLock<String>>>,
}

/// One task for each hypervisor; ended when this is dropped.
#[derive(Default)]
struct Followers {
    tasks: JoinSet<()>,
    keys: HashMap<Id, Key>,
    running: HashSet<Key>,
}

/// Listens to every hypervisor on the node until `stop`, or until nobody listens to `events`.
///
/// Events wait for room in the channel, each hypervisor's in their order. Nothing that this has started is left when it
/// returns or is dropped.
pub async fn watch(config: Config, events: mpsc::Sender<LifecycleEvent>, stop: CancellationToken) {
    let deaf = events.clone();
    let mut watch = Watch {
        config,
        events,
        starting: Arc::new(Semaphore::new(STARTING)),
        followers: Followers::default(),
        guests: HashMap::new(),
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = deaf.closed() => {}
        () = watch.run() => {}
    }
    watch.followers.tasks.shutdown().await;
}

impl Watch {
    async fn run(&mut self) {
        for uri in self.config.connect_uris.clone() {
            let key = |feed| Key::Uri(uri.clone(), feed);
            self.follow_libvirt(key, &Daemon::Uri(uri.clone()));
        }
        let mut rescan = rescan();
        let looks = !(self.config.sockets.is_empty() && self.config.qmp.is_empty());
        loop {
            tokio::select! {
                _ = rescan.tick(), if looks => self.look().await,
                // One whose socket is gone. If another path leads to the same one, the next look finds it.
                Some(()) = self.followers.ended() => {}
                else => return std::future::pending().await,
            }
        }
    }

    async fn look(&mut self) {
        for socket in found(&self.config.sockets).await {
            let id = socket.id;
            self.follow_libvirt(|feed| Key::Libvirt(id, feed), &Daemon::Socket(socket));
        }
        let followers = &self.followers;
        let feeds = [Feed::Lifecycle, Feed::Monitors];
        let is_there = |id| {
            feeds
                .into_iter()
                .any(|feed| followers.has(&Key::Libvirt(id, feed)))
        };
        self.guests.retain(|id, _| is_there(*id));
        for socket in found(&self.config.qmp).await {
            let key = Key::Qmp(socket.id);
            if self.followers.lacks(&key) {
                let name = socket.to_string();
                let follower = Follower {
                    believed: Domain::First,
                    ..self.follower(name, Origin::Qmp, Counted::Hypervisor)
                };
                let monitor = Qmp {
                    socket,
                    counts: self.config.counts.clone(),
                };
                self.followers.spawn(key, follower.follow(monitor));
            }
        }
    }

    /// Listens to a daemon, where that is not done already.
    fn follow_libvirt(&mut self, key: impl Fn(Feed) -> Key, daemon: &Daemon) {
        let (name, believed, guest) = match daemon {
            Daemon::Uri(uri) => (uri.clone(), Domain::Any, Arc::default()),
            Daemon::Socket(socket) => {
                let guest = self.guests.entry(socket.id).or_default().clone();
                (socket.to_string(), Domain::First, guest)
            }
        };
        let state = || State {
            domains: Domains::default(),
            only: guest.clone(),
        };
        let lifecycle = key(Feed::Lifecycle);
        if self.followers.lacks(&lifecycle) {
            let follower = Follower {
                believed,
                state: state(),
                ..self.follower(name.clone(), Origin::Libvirt, Counted::Hypervisor)
            };
            let virsh = Virsh {
                program: self.config.virsh.clone(),
                daemon: daemon.clone(),
                counts: self.config.counts.clone(),
                starting: self.starting.clone(),
            };
            self.followers.spawn(lifecycle, follower.follow(virsh));
        }
        let monitors = key(Feed::Monitors);
        if self.config.read_only || !self.followers.lacks(&monitors) {
            return;
        }
        let Some(behind) = Monitors::behind(daemon) else {
            tracing::info!(
                hypervisor = name,
                "QEMU's events are not heard: no plain socket of this host's; pauses are heard of later"
            );
            return;
        };
        let follower = Follower {
            believed,
            state: state(),
            ..self.follower(
                format!("QEMU behind {name}"),
                Origin::Qmp,
                Counted::Monitors,
            )
        };
        self.followers.spawn(monitors, follower.follow(behind));
    }

    /// One that believes all that it is told.
    fn follower(&self, name: String, origin: Origin, counted: Counted) -> Follower {
        Follower {
            name,
            origin,
            counted,
            believed: Domain::Any,
            counts: self.config.counts.clone(),
            events: self.events.clone(),
            state: State::default(),
        }
    }
}

impl Followers {
    fn spawn(&mut self, key: Key, follower: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(follower).id();
        self.keys.insert(id, key.clone());
        self.running.insert(key);
    }

    /// Waits until one has ended; none if there is none. Cancel safe.
    async fn ended(&mut self) -> Option<()> {
        let id = match self.tasks.join_next_with_id().await? {
            Ok((id, ())) => id,
            Err(error) => error.id(),
        };
        if let Some(key) = self.keys.remove(&id) {
            self.running.remove(&key);
        }
        Some(())
    }

    /// Whether there is none for this, and room for one.
    fn lacks(&self, key: &Key) -> bool {
        self.running.len() < MOST && !self.has(key)
    }

    fn has(&self, key: &Key) -> bool {
        self.running.contains(key)
    }
}

fn rescan() -> Interval {
    let mut rescan = interval(RESCAN);
    rescan.set_missed_tick_behavior(MissedTickBehavior::Delay);
    rescan
}

async fn found(patterns: &[PathPattern]) -> Vec<SocketFile> {
    if patterns.is_empty() {
        return Vec::new();
    }
    let patterns = patterns.to_vec();
    // It fails where the runtime ends, and then nobody looks any more.
    let found = tokio::task::spawn_blocking(move || find(&patterns));
    found.await.unwrap_or_default()
}

#[cfg(test)]
mod tests;
