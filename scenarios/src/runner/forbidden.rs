//! Flows that must never pass: what is tried is counted at the sender, what comes through at the
//! guest's taps, so that no lost answer can hide it.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dataplane_probe::watch;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{oneshot, watch as flag};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::lab::Host;
use crate::report::Tried;

use super::inside::begin;

/// The port that nothing is let in to. No program of the guest serves it: its kernel answers.
pub(super) const SHUT: u16 = 7_001;
/// Between two attempts to connect.
const CONNECT_EVERY: Duration = Duration::from_millis(50);
/// An attempt that is not answered within this is not.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks for a tap that does not exist yet. It is created milliseconds before it is
/// plugged, and nothing announces it to another process.
const LOOK: Duration = Duration::from_millis(1);
/// What is on its way when the sender stops has arrived after this.
const SETTLE: Duration = Duration::from_millis(200);
const PAYLOAD: [u8; 64] = *b"This must not pass. This must not pass. This must not pass......";

/// Attempts in progress.
pub(super) struct Forbidding {
    stop: flag::Sender<bool>,
    sender: oneshot::Receiver<Result<Tried>>,
    taps: Vec<Tap>,
}

/// Everything that comes to the shut port, counted where the guest's interface is.
struct Tap {
    stop: flag::Sender<bool>,
    reached: Arc<AtomicU64>,
    ended: oneshot::Receiver<Result<()>>,
}

impl Forbidding {
    /// Begins to try, `rate_hz` packets a second, and to watch the guest's tap on every node where
    /// it is or comes to be.
    pub(super) fn start(
        from: &Host,
        address: IpAddr,
        rate_hz: u32,
        nodes: &[&Host],
        tap: &str,
    ) -> Result<Self> {
        let taps = nodes.iter().map(|node| Tap::watch(node, tap));
        let taps = taps.collect::<Result<_>>()?;
        let (stop, stopped) = flag::channel(false);
        let target = SocketAddr::new(address, SHUT);
        let sender = begin(from, "forbidden", move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("tokio runtime")?;
            runtime.block_on(attempt(target, rate_hz, stopped))
        })?;
        Ok(Self { stop, sender, taps })
    }

    /// Ends it and says what was tried and what came through.
    pub(super) async fn finish(self) -> Result<Tried> {
        self.stop.send_replace(true);
        let mut tried = self.sender.await.context("the sender died")??;
        sleep(SETTLE).await;
        for tap in self.taps {
            tried.reached += tap.finish().await?;
        }
        Ok(tried)
    }
}

impl Tap {
    fn watch(node: &Host, tap: &str) -> Result<Self> {
        let (stop, stopped) = flag::channel(false);
        let reached = Arc::new(AtomicU64::new(0));
        let config = watch::Config {
            interface: tap.to_owned(),
            mac: None,
            port: Some(SHUT),
            all: false,
        };
        let ended = begin(node, "shut", {
            let reached = Arc::clone(&reached);
            move || count(&config, &reached, &stopped)
        })?;
        Ok(Self {
            stop,
            reached,
            ended,
        })
    }

    async fn finish(self) -> Result<u64> {
        self.stop.send_replace(true);
        self.ended.await.context("the watch died")??;
        Ok(self.reached.load(Ordering::Relaxed))
    }
}

/// Counts what is delivered to the guest until stopped; a tap may come, go and come again. What may have
/// passed unseen is an error.
fn count(
    config: &watch::Config,
    reached: &AtomicU64,
    stopped: &flag::Receiver<bool>,
) -> Result<()> {
    let over = || *stopped.borrow() || stopped.has_changed().is_err();
    while !over() {
        let mut watcher = match watch::Watcher::open(config) {
            Ok(watcher) => watcher,
            Err(watch::Error::NoInterface { .. }) => {
                thread::sleep(LOOK);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        while !over() {
            let events = match watcher.poll() {
                Ok(events) => events.unwrap_or_default(),
                // With the guest.
                Err(watch::Error::Gone { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            let delivered = events.iter().filter(|event| is_delivered(event)).count();
            reached.fetch_add(delivered as u64, Ordering::Relaxed);
        }
        let dropped = watcher.dropped()?;
        ensure!(
            dropped == 0,
            "{dropped} frames of {} came faster than they could be counted",
            config.interface
        );
    }
    Ok(())
}

fn is_delivered(event: &watch::Event) -> bool {
    matches!(
        event,
        watch::Event::Frame {
            direction: watch::Direction::Out,
            ..
        }
    )
}

async fn attempt(target: SocketAddr, rate_hz: u32, stopped: flag::Receiver<bool>) -> Result<Tried> {
    let (packets, connections) = tokio::join!(
        packets(target, rate_hz, stopped.clone()),
        connections(target, stopped)
    );
    let ((sent, echoed), (attempted, connected)) = (packets?, connections);
    Ok(Tried {
        sent,
        attempted,
        reached: 0,
        answered: echoed + connected,
    })
}

/// Sends at the rate; returns packets sent and answered.
async fn packets(
    target: SocketAddr,
    rate_hz: u32,
    mut stopped: flag::Receiver<bool>,
) -> Result<(u64, u64)> {
    let any: IpAddr = if target.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await.context("a UDP socket")?;
    socket.connect(target).await.context("a UDP socket")?;
    let mut due = interval(Duration::from_secs(1) / rate_hz);
    due.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut sent, mut answered) = (0, 0);
    let mut buffer = [0; 128];
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return Ok((sent, answered)),
            _ = due.tick() => {
                // An ICMP answer to an earlier packet is told by the next call, which then sends
                // nothing.
                let result = loop {
                    match socket.try_send(&PAYLOAD) {
                        Err(error) if error.kind() == ErrorKind::ConnectionRefused => answered += 1,
                        result => break result,
                    }
                };
                // One that the sender's own host did not let go has tried nothing.
                sent += u64::from(result.is_ok());
            }
            received = socket.recv(&mut buffer) => answered += u64::from(is_answer(&received)),
        }
    }
}

/// Data, or the guest's word that nobody is there: both show that the packet came through.
fn is_answer(received: &std::io::Result<usize>) -> bool {
    match received {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
    }
}

/// Attempts to connect at their rate; returns attempts and those answered, be it by a refusal.
async fn connections(target: SocketAddr, mut stopped: flag::Receiver<bool>) -> (u64, u64) {
    let mut due = interval(CONNECT_EVERY);
    let mut running = JoinSet::new();
    let mut attempted = 0;
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => break,
            _ = due.tick() => {
                attempted += 1;
                running.spawn(timeout(CONNECT_PATIENCE, TcpStream::connect(target)));
            }
        }
    }
    let mut answered = 0;
    while let Some(ended) = running.join_next().await {
        answered += u64::from(match ended {
            Ok(Ok(Ok(_))) => true,
            Ok(Ok(Err(error))) => error.kind() == ErrorKind::ConnectionRefused,
            _ => false,
        });
    }
    (attempted, answered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refusal_is_an_answer() {
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let target = free.local_addr().unwrap();
        drop(free);
        let (stop, stopped) = flag::channel(false);
        let trying = tokio::spawn(attempt(target, 500, stopped));
        sleep(Duration::from_millis(100)).await;
        stop.send_replace(true);
        let tried = trying.await.unwrap().unwrap();
        assert!(tried.sent > 0 && tried.attempted > 0, "{tried:?}");
        // The kernel limits how many ICMP messages it sends, but not to none.
        assert!(tried.answered > tried.attempted, "{tried:?}");
    }

    #[tokio::test]
    async fn silence_is_none() {
        // Bound, and never answering.
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (stop, stopped) = flag::channel(false);
        let trying = tokio::spawn(packets(silent.local_addr().unwrap(), 500, stopped));
        silent.readable().await.unwrap();
        stop.send_replace(true);
        let (sent, answered) = trying.await.unwrap().unwrap();
        assert!(sent > 0);
        assert_eq!(answered, 0);
    }
}
