//! Serving TCP: control, the stream's echo, and new connections.

use std::net::{IpAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use super::call;
use super::session::{Session, Sessions, Sockets, Wanted};
use crate::control::{MAX_REQUEST, Request, Response};
use crate::sys::total_retransmits;
use crate::wire::{GREETING, Greeting, Malformed, Role};

/// Connections at a time; more wait in the listener's queue.
const MAX_CONNECTIONS: usize = 512;
/// How long a client may take to say what it wants, or to take the answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often retransmissions of the stream are read, for a report on a stream that never ends well.
const READ_TCP_INFO: Duration = Duration::from_secs(1);
/// How often silent sessions are looked for.
const EXPIRE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
struct Shared {
    sessions: Arc<Sessions>,
    sockets: Sockets,
    may_call: bool,
}

pub(super) async fn serve(
    listeners: Vec<StdListener>,
    sessions: Arc<Sessions>,
    sockets: Sockets,
    may_call: bool,
    mut stopped: watch::Receiver<bool>,
) {
    let shared = Shared {
        sessions: Arc::clone(&sessions),
        sockets,
        may_call,
    };
    let mut tasks = JoinSet::new();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for listener in listeners {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                tasks.spawn(accept(listener, shared.clone(), Arc::clone(&slots)));
            }
            Err(error) => tracing::error!(%error, "cannot serve TCP"),
        }
    }
    let mut expire = interval(EXPIRE);
    loop {
        tokio::select! {
            // An error means that the reflector itself is gone, which is a stop too.
            _ = stopped.changed() => break,
            _ = expire.tick() => sessions.expire(),
        }
    }
}

async fn accept(listener: TcpListener, shared: Shared, slots: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((connection, peer)) => {
                let shared = shared.clone();
                connections.spawn(async move {
                    let _slot = slot;
                    if let Err(error) = handle(connection, &shared).await {
                        tracing::debug!(%peer, %error, "connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn handle(mut connection: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut bytes = [0; GREETING];
    timeout(PATIENCE, connection.read_exact(&mut bytes)).await??;
    let greeting = match Greeting::decode(&bytes) {
        Ok(greeting) => greeting,
        Err(Malformed::Version(version)) => {
            // A client of another version understands lines of JSON, if anything.
            let reason = Malformed::Version(version).to_string();
            return respond(&mut connection, &Response::Refused { reason }).await;
        }
        // Nothing to say to a stranger.
        Err(_) => return Ok(()),
    };
    connection.set_nodelay(true)?;
    match greeting.role {
        Role::Connect => connection.write_all(&bytes).await,
        Role::Stream => match shared.sessions.get(greeting.session) {
            Some(session) => echo(connection, &session).await,
            None => Ok(()),
        },
        Role::Control => timeout(PATIENCE, control(connection, shared)).await?,
    }
}

/// Sends everything back until the other side closes.
pub(super) async fn echo(mut connection: TcpStream, session: &Session) -> std::io::Result<()> {
    let mut buffer = vec![0; 4096];
    let mut look = interval(READ_TCP_INFO);
    loop {
        tokio::select! {
            read = connection.read(&mut buffer) => {
                let read = read?;
                if read == 0 {
                    break;
                }
                connection.write_all(&buffer[..read]).await?;
            }
            _ = look.tick() => note_retransmits(&connection, session),
        }
    }
    note_retransmits(&connection, session);
    connection.shutdown().await
}

fn note_retransmits(connection: &TcpStream, session: &Session) {
    if let Some(count) = total_retransmits(connection.as_fd()) {
        session.set_stream_retransmits(count);
    }
}

async fn control(connection: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let local = connection.local_addr()?.ip();
    let mut connection = BufReader::new(connection);
    let mut line = String::new();
    (&mut connection)
        .take(MAX_REQUEST)
        .read_line(&mut line)
        .await?;
    let response = match serde_json::from_str(&line) {
        Ok(request) => {
            answer(&request, local, shared).unwrap_or_else(|reason| Response::Refused { reason })
        }
        Err(error) => Response::Refused {
            reason: format!("not a request: {error}"),
        },
    };
    respond(connection.get_mut(), &response).await
}

fn answer(request: &Request, local: IpAddr, shared: &Shared) -> Result<Response, String> {
    let find = |id: u64| {
        shared.sessions.get(id).ok_or_else(|| {
            format!("there is no session {id:016x}: it was silent for too long, or the reflector was started anew")
        })
    };
    match *request {
        Request::Open {
            session,
            period_ns,
            packet_bytes,
            log,
        } => {
            let wanted = Wanted {
                id: session,
                period_ns,
                packet_bytes,
                log,
            };
            shared.sessions.open(wanted, local, &shared.sockets)?;
            Ok(Response::Done)
        }
        Request::Call {
            session,
            to,
            stream,
            connections,
        } => {
            if !shared.may_call {
                return Err(
                    "it calls nobody; start it as `dataplane-probe reflect --may-call`".to_owned(),
                );
            }
            call::begin(&find(session)?, to, stream, connections)?;
            Ok(Response::Done)
        }
        Request::Start { session } => {
            let session = find(session)?;
            shared.sessions.start(&session)?;
            call::open_connections(&session);
            Ok(Response::Done)
        }
        Request::Finish {
            session,
            to_vm_sent,
        } => Ok(Response::Finished(Box::new(
            find(session)?.finish(to_vm_sent),
        ))),
        Request::Log { session } => Ok(Response::Log(find(session)?.log())),
        Request::Close { session } => {
            shared.sessions.close(session);
            Ok(Response::Done)
        }
    }
}

async fn respond(connection: &mut TcpStream, response: &Response) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    connection.write_all(&line).await?;
    connection.shutdown().await
}
