//! One watched interface.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use crate::answer::{Ignored, Malformed, advertisement, decide};
use crate::limiter::{Limiter, Limits};
use crate::metrics::Metrics;
use crate::socket::{Buffer, PacketSocket, Received};
use crate::{Gateway, chain};

/// The longest time between two router advertisements that nobody asked for (RFC 4861, section 6.2.1).
const ADVERTISE: Duration = Duration::from_mins(10);
/// Of three in a lifetime two may get lost.
const ADVERTISEMENTS_PER_LIFETIME: u32 = 3;
const SHORTEST: Duration = Duration::from_secs(3);

/// What all ports have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) gateway: Gateway,
    pub(crate) limits: Limits,
    pub(crate) metrics: Arc<Metrics>,
}

/// Watches an interface until it is dropped.
#[derive(Debug)]
pub(crate) struct Port {
    name: String,
    shared: Arc<Shared>,
    socket: Arc<PacketSocket>,
    task: JoinHandle<()>,
}

struct Worker {
    shared: Arc<Shared>,
    socket: Arc<PacketSocket>,
    limiter: Limiter,
    /// As the kernel counts them.
    dropped: u32,
}

impl Port {
    pub(crate) fn open(index: u32, name: &str, shared: &Arc<Shared>) -> io::Result<Self> {
        let socket = Arc::new(PacketSocket::open(index, &shared.gateway)?);
        let worker = Worker {
            shared: shared.clone(),
            socket: socket.clone(),
            limiter: Limiter::new(shared.limits),
            dropped: 0,
        };
        let interface = name.to_owned();
        let task = tokio::spawn(async move {
            let error = worker.run().await;
            tracing::warn!(interface, error = %chain(&error), "cannot receive; starting over");
        });
        Ok(Self {
            name: name.to_owned(),
            shared: shared.clone(),
            socket,
            task,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn rename(&mut self, name: &str) {
        if self.name != name {
            tracing::info!(interface = self.name, name, "has a new name");
            name.clone_into(&mut self.name);
        }
    }

    /// It watches no longer.
    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(&self.socket, &self.shared.metrics, frame)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Worker {
    /// Answers until receiving fails for good.
    async fn run(mut self) -> io::Error {
        let mut buffer = Buffer::new();
        let advertisement = advertisement(&self.shared.gateway);
        let mut advertise = interval(advertising_interval(&self.shared.gateway));
        advertise.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let socket = self.socket.clone();
        loop {
            tokio::select! {
                biased;
                received = socket.receive(&mut buffer) => match received {
                    Ok(received) => self.take(&received),
                    // It comes up again or goes away, and netlink tells which.
                    Err(error) if error.kind() == io::ErrorKind::NetworkDown => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return error,
                },
                _ = advertise.tick(), if advertisement.is_some() => {
                    if let Some(frame) = &advertisement {
                        // While the interface is down there is nobody to tell; those who come ask.
                        let _ = send(&self.socket, &self.shared.metrics, frame);
                    }
                }
            }
        }
    }

    fn take(&mut self, received: &Received<'_>) {
        let metrics = &self.shared.metrics;
        if received.dropped != self.dropped {
            metrics.dropped(received.dropped.wrapping_sub(self.dropped));
            self.dropped = received.dropped;
        }
        let decision = if received.cut {
            Err(Ignored::Malformed(Malformed::Length))
        } else {
            decide(&self.shared.gateway, received.bytes, received.tag)
        };
        match decision {
            Err(ignored) => {
                metrics.ignored(ignored);
                tracing::trace!(?ignored, "not answered");
            }
            Ok(answer) => {
                metrics.asked(answer.kind);
                if !self.limiter.allows(answer.asker, Instant::now()) {
                    metrics.limited(answer.kind);
                } else if send(&self.socket, metrics, &answer.frame).is_ok() {
                    metrics.answered(answer.kind);
                    tracing::debug!(kind = %answer.kind, to = %answer.asker, "answered");
                }
            }
        }
    }
}

fn send(socket: &PacketSocket, metrics: &Metrics, frame: &[u8]) -> io::Result<()> {
    socket.send(frame).inspect_err(|error| {
        metrics.not_sent();
        tracing::debug!(%error, "not sent");
    })
}

fn advertising_interval(gateway: &Gateway) -> Duration {
    let lifetime = gateway.router().map_or(0, |(router, _)| router.lifetime);
    match Duration::from_secs(lifetime.into()) / ADVERTISEMENTS_PER_LIFETIME {
        Duration::ZERO => ADVERTISE,
        third => third.clamp(SHORTEST, ADVERTISE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Router;

    #[test]
    fn a_default_router_is_advertised_before_it_expires() {
        let every = |lifetime| {
            let router = Router {
                lifetime,
                managed: false,
                prefixes: Vec::new(),
            };
            advertising_interval(&Gateway::default().with_router(router).unwrap()).as_secs()
        };
        assert_eq!(every(900), 300);
        assert_eq!(every(9000), 600);
        assert_eq!(every(1), 3);
        // Of no lifetime at all there is nothing to renew.
        assert_eq!(every(0), 600);
    }
}
