//! Between a controller and the Northbound, so that the controller can be killed between two writes.
//!
//! One write of the controller's can follow another within a millisecond, and whoever watches the
//! database for the first cannot kill it before the second. A gate makes what the controller sends
//! arrive later, but not what it is told; and what it sent and what has not arrived when the gate is
//! shut, it has not sent.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// By how much later it arrives. Far longer than a busy machine takes to notice a change and to kill a
/// process, and nothing to anybody's deadline. A failed migration shows on its VM's object first, from
/// which the controller knows it, and some 30 ms later on its own, from which others do.
const LATER: Duration = Duration::from_millis(500);

/// A way to the Northbound that can be made slow and shut. Dropped, it is gone.
#[derive(Debug)]
pub struct Gate {
    address: SocketAddr,
    pass: watch::Sender<Pass>,
    serving: JoinHandle<()>,
}

/// What becomes of what the controller sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    AtOnce,
    Later,
    Never,
}

impl Gate {
    /// Opens one to an endpoint, `tcp:<address>:<port>`, on this host's loopback.
    ///
    /// # Errors
    /// When the endpoint is another one, or no port is to be had.
    pub async fn open(endpoint: &str) -> Result<Self> {
        let north = endpoint.strip_prefix("tcp:");
        let north: SocketAddr = north
            .and_then(|north| north.parse().ok())
            .with_context(|| format!("a gate leads to tcp:<address>:<port>, not to {endpoint}"))?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.context("a gate's port")?;
        let (pass, passes) = watch::channel(Pass::AtOnce);
        Ok(Self {
            address: listener.local_addr().context("a gate's port")?,
            pass,
            serving: tokio::spawn(serve(listener, north, passes)),
        })
    }

    /// What leads through it.
    pub fn endpoint(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// What is sent from now on arrives later.
    pub fn slow(&self) {
        self.pass.send_replace(Pass::Later);
    }

    /// Nothing arrives any more.
    pub fn shut(&self) {
        self.pass.send_replace(Pass::Never);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(listener: TcpListener, north: SocketAddr, passes: watch::Receiver<Pass>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((controller, _)) => {
                    connections.spawn(connect(controller, north, passes.clone()));
                }
                Err(error) => tracing::warn!(%error, "a gate cannot take a connection"),
            },
            // A connection's errors are those of its ends, who know of them.
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Ends when either end does.
async fn connect(
    controller: TcpStream,
    north: SocketAddr,
    passes: watch::Receiver<Pass>,
) -> std::io::Result<()> {
    let server = TcpStream::connect(north).await?;
    controller.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_controller, mut to_controller) = controller.into_split();
    let (mut from_server, to_server) = server.into_split();
    tokio::select! {
        ended = pass_on(from_controller, to_server, passes) => ended,
        ended = tokio::io::copy(&mut from_server, &mut to_controller) => ended.map(drop),
    }
}

async fn pass_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut passes: watch::Receiver<Pass>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await?;
        if *passes.borrow() == Pass::Later {
            tokio::select! {
                () = tokio::time::sleep(LATER) => {}
                // The gate may be gone: then this task goes as well.
                _ = passes.wait_for(|pass| *pass == Pass::Never) => {}
            }
        }
        let sent = buffer.get(..read).unwrap_or_default();
        if sent.is_empty() || *passes.borrow() == Pass::Never {
            return Ok(());
        }
        to.write_all(sent).await?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test]
    async fn what_has_not_arrived_was_not_sent() {
        let north = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("tcp:{}", north.local_addr().unwrap());
        let gate = Gate::open(&endpoint).await.unwrap();
        let address = gate.endpoint().replace("tcp:", "");
        let mut controller = TcpStream::connect(address).await.unwrap();
        let (mut server, _) = north.accept().await.unwrap();
        let mut byte = [0];

        controller.write_all(b"a").await.unwrap();
        server.read_exact(&mut byte).await.unwrap();
        server.write_all(b"A").await.unwrap();
        controller.read_exact(&mut byte).await.unwrap();

        gate.slow();
        let sent = Instant::now();
        controller.write_all(b"b").await.unwrap();
        server.write_all(b"B").await.unwrap();
        controller.read_exact(&mut byte).await.unwrap();
        assert!(sent.elapsed() < LATER, "what it is told is not late");
        server.read_exact(&mut byte).await.unwrap();
        assert!(sent.elapsed() >= LATER);

        controller.write_all(b"c").await.unwrap();
        gate.shut();
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty(), "{rest:?}");
    }

    #[tokio::test]
    async fn a_gate_is_for_tcp() {
        assert!(Gate::open("unix:/run/ovn/nb.sock").await.is_err());
    }
}
