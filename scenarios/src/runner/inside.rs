//! Work of this process inside a host's network: the probe, the watch on a tap, a greeting.
//!
//! A network namespace belongs to a thread, and threads inherit it from the one that starts them;
//! so each piece of work gets a thread of its own, which ends with it.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow};
use dataplane_probe::run::{Callee, Config, Outcome, Probe};
use dataplane_probe::watch;
use tokio::sync::oneshot;

pub(super) use crate::lab::REFLECTOR;
use crate::lab::{Host, MacAddr};

/// A guest answers in a millisecond; this is for one whose network is broken.
const GREETING_DEADLINE: Duration = Duration::from_secs(3);

/// Runs something on a thread of its own in a host's network.
pub(super) async fn inside<T: Send + 'static>(
    host: &Host,
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let receiver = begin(host, name, work)?;
    receiver.await.map_err(|_| anyhow!("{name} panicked"))?
}

/// [`inside`] without waiting for it to end.
pub(super) fn begin<T: Send + 'static>(
    host: &Host,
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<oneshot::Receiver<Result<T>>> {
    let (sender, receiver) = oneshot::channel();
    let host = host.clone();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let done = host.enter_netns().and_then(|()| work());
            // Whoever waited may have been cancelled.
            _ = sender.send(done);
        })
        .context("start a thread")?;
    Ok(receiver)
}

/// A measurement between a host and a guest, in progress.
pub(super) struct Measuring {
    probe: Probe,
    host: Host,
}

impl Measuring {
    /// Begins to measure from a host; returns when the first packet is due.
    pub(super) async fn start(host: &Host, config: Config) -> Result<Self> {
        let probe = inside(host, "probe", move || Ok(Probe::start(config)?)).await?;
        Ok(Self {
            probe,
            host: host.clone(),
        })
    }

    /// Ends the measurement.
    pub(super) async fn finish(self) -> Result<Outcome> {
        let Self { probe, host } = self;
        // The reflector is asked for its account over new connections, so the thread matters here too.
        let outcome = inside(&host, "probe", move || Ok(probe.finish())).await?;
        for warning in &outcome.warnings {
            tracing::warn!("{warning}");
        }
        Ok(outcome)
    }
}

/// Listens on a host for a guest's calls.
pub(super) async fn listen(host: &Host, address: IpAddr) -> Result<Arc<Callee>> {
    let address = SocketAddr::new(address, 0);
    inside(host, "listen", move || {
        let callee = Callee::bind(address).with_context(|| format!("listen on {address}"))?;
        Ok(Arc::new(callee))
    })
    .await
}

/// Says when the guest behind a tap sends its first frames after it resumed.
///
/// QEMU's own announcement (RARP) goes out on the guest's behalf and possibly before it runs, so it
/// is not the guest's first frame. Dropping the returned watch ends it.
pub(super) struct FirstFrame {
    stop: watch::StopHandle,
    frames: oneshot::Receiver<Frames>,
}

/// What a tap showed.
#[derive(Default)]
struct Frames {
    sent: Vec<Sent>,
    /// Why there may have been more.
    missed: Option<String>,
}

/// A frame of the guest's.
#[derive(Clone, Copy)]
struct Sent {
    /// In nanoseconds of Unix time.
    at_ns: u64,
    /// As the probe's packets are.
    is_udp: bool,
}

/// When a guest was first heard again after it resumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Awake {
    /// By whatever it sent.
    pub(super) frame: Option<SystemTime>,
    /// By UDP, which is the probe's: what it sends first may be long before.
    pub(super) packet: Option<SystemTime>,
}

/// `IPPROTO_UDP`.
const UDP: u8 = 17;

impl FirstFrame {
    /// Begins to watch.
    pub(super) async fn watch(node: &Host, tap: String, mac: MacAddr) -> Result<Self> {
        let mac = mac.to_string().parse().context("the guest's address")?;
        let config = watch::Config {
            interface: tap,
            mac: Some(mac),
            port: None,
            all: true,
        };
        let (sender, frames) = oneshot::channel();
        let stop = inside(node, "watch", move || {
            let mut watcher = watch::Watcher::open(&config)?;
            let stop = watcher.stop_handle();
            thread::Builder::new()
                .name("watch".to_owned())
                .spawn(move || {
                    // Whoever waited may have been cancelled.
                    _ = sender.send(follow(&mut watcher));
                })
                .context("start a thread")?;
            Ok(stop)
        })
        .await?;
        Ok(Self { stop, frames })
    }

    /// Ends the watch and says when the first frames came after the guest had `resumed`, and why they may not have been
    /// the first.
    pub(super) async fn after(self, resumed: SystemTime) -> (Awake, Option<String>) {
        self.stop.stop();
        let Frames { sent, missed } = self.frames.await.unwrap_or_default();
        let moment = |sent: &Sent| SystemTime::UNIX_EPOCH + Duration::from_nanos(sent.at_ns);
        let since = |sent: &&Sent| moment(sent) >= resumed;
        let awake = Awake {
            frame: sent.iter().filter(since).map(moment).min(),
            packet: {
                let packets = sent.iter().filter(|sent| sent.is_udp);
                packets.filter(since).map(moment).min()
            },
        };
        (awake, missed)
    }
}

fn follow(watcher: &mut watch::Watcher) -> Frames {
    let mut sent = Vec::new();
    let ended = loop {
        match watcher.poll() {
            Ok(Some(events)) => sent.extend(events.iter().filter_map(sent_by_guest)),
            // The tap goes with the guest at the latest; that ends the watch as well.
            Ok(None) | Err(watch::Error::Gone { .. }) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    let missed = match ended.and_then(|()| watcher.dropped()) {
        Ok(0) => None,
        Ok(dropped) => Some(format!(
            "the watch on the target's tap missed {dropped} frames: the guest's first may be among them"
        )),
        Err(error) => {
            let error = anyhow::Error::new(error);
            Some(format!(
                "the watch on the target's tap ended early, and may have missed the guest's first frame: {error:#}"
            ))
        }
    };
    Frames { sent, missed }
}

fn sent_by_guest(event: &watch::Event) -> Option<Sent> {
    match event {
        watch::Event::Frame {
            t_ns,
            direction: watch::Direction::In,
            kind,
            protocol,
            ..
        } if *kind != watch::Kind::Rarp => Some(Sent {
            at_ns: *t_ns,
            is_udp: *protocol == Some(UDP),
        }),
        _ => None,
    }
}

/// Whether a guest answers at an address: connects to its reflector's port from the client.
pub(super) async fn answers(client: &Host, address: IpAddr) -> Result<()> {
    inside(client, "greet", move || {
        let target = SocketAddr::new(address, REFLECTOR);
        TcpStream::connect_timeout(&target, GREETING_DEADLINE)
            .map(drop)
            .with_context(|| format!("{target} does not answer"))
    })
    .await
}
