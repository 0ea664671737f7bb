//! Calling: the machine opens the stream and the connections, as one behind a NAT must.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::session::Session;
use super::tcp::echo;
use crate::clock::MILLISECOND;
use crate::control::Connections;
use crate::run::connections::{Failure, greet};
use crate::wire::{Greeting, Role};

/// The shortest time between two connections.
const SHORTEST_NS: u64 = MILLISECOND;

/// Greets the client over UDP, and dials the stream unless that was done before.
pub(super) fn begin(
    session: &Arc<Session>,
    to: SocketAddr,
    stream: bool,
    connections: Option<Connections>,
) -> Result<(), String> {
    if connections.is_some_and(|connections| connections.every_ns < SHORTEST_NS) {
        return Err("the time between two connections is below 1 ms".to_owned());
    }
    if session.call(to, stream, connections)? {
        let session = Arc::clone(session);
        tokio::spawn(async move {
            if let Err(error) = dial(&session, to).await {
                tracing::info!(%to, %error, "the stream ended");
            }
        });
    }
    Ok(())
}

/// Opens connections at their rate from now on, once, if the client wants any.
pub(super) fn open_connections(session: &Arc<Session>) {
    if let Some((to, connections)) = session.take_connections() {
        tokio::spawn(keep_connecting(Arc::clone(session), to, connections));
    }
}

async fn dial(session: &Session, to: SocketAddr) -> io::Result<()> {
    let mut connection = connect(session, to).await?;
    connection.set_nodelay(true)?;
    let greeting = Greeting {
        role: Role::Stream,
        session: session.id(),
    };
    connection.write_all(&greeting.encode()).await?;
    echo(connection, session).await
}

/// From the address that the client knows this machine by: it may have others.
async fn connect(session: &Session, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.bind(SocketAddr::new(session.source(), 0))?;
    socket.connect(to).await
}

async fn keep_connecting(session: Arc<Session>, to: SocketAddr, connections: Connections) {
    let patience = Duration::from_nanos(connections.timeout_ns);
    let mut due = interval(Duration::from_nanos(connections.every_ns));
    // What the machine missed while it did not run was never due by its own clock.
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if session.is_stopped() {
            return;
        }
        session.attempts(|attempts| {
            attempts.attempted += 1;
            attempts.pending += 1;
        });
        let session = Arc::clone(&session);
        tokio::spawn(async move {
            let result = attempt(&session, to, Instant::now() + patience).await;
            enter(&session, result.err(), patience);
        });
    }
}

async fn attempt(session: &Session, to: SocketAddr, deadline: Instant) -> Result<(), Failure> {
    let greeted = async {
        let connection = connect(session, to).await?;
        greet(connection, session.id()).await
    };
    tokio::time::timeout_at(deadline, greeted)
        .await
        .unwrap_or(Err(Failure::TimedOut))
}

fn enter(session: &Session, failure: Option<Failure>, patience: Duration) {
    session.attempts(|attempts| {
        attempts.pending = attempts.pending.saturating_sub(1);
        let Some(failure) = failure else { return };
        let told = match failure {
            Failure::TimedOut => {
                attempts.timed_out += 1;
                format!("no answer within {} ms", patience.as_millis())
            }
            Failure::Refused(error) => {
                attempts.refused += 1;
                error.to_string()
            }
            Failure::Reset(error) => {
                attempts.reset += 1;
                error.to_string()
            }
            Failure::Other(error) => {
                attempts.other += 1;
                error.to_string()
            }
        };
        attempts.error.get_or_insert(told);
    });
}
