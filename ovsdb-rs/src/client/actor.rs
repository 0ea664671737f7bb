//! The task behind a client: connects, reads, writes, probes; everything else is the session's.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::codec::Decoder;
use tracing::{debug, info, warn};

use super::call::Command;
use super::session::Session;
use super::{ClientOptions, ConnectionState};
use crate::wire::{FrameDecoder, FrameError};
use crate::{Endpoint, Endpoints};

/// A server that sends requests and does not read our answers must not fill our memory.
const MAX_UNWRITTEN: usize = 256 << 20;
/// How much room a read gets at least.
const READ_SIZE: usize = 64 << 10;
/// A pause before a monitor that the server refused is requested again: databases and schemas appear
/// seldom, and by the hand of a person.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Actor {
    endpoints: Endpoints,
    options: ClientOptions,
    commands: mpsc::UnboundedReceiver<Command>,
    state: watch::Sender<ConnectionState>,
    session: Session,
}

/// Every client is gone.
struct Shutdown;

/// How a connection ended.
enum End {
    Shutdown,
    Lost(String),
}

trait Stream: AsyncRead + AsyncWrite + Send {}

impl<S: AsyncRead + AsyncWrite + Send> Stream for S {}

impl Actor {
    pub(super) fn new(
        endpoints: Endpoints,
        options: ClientOptions,
        ids: Arc<AtomicU64>,
        commands: mpsc::UnboundedReceiver<Command>,
        state: watch::Sender<ConnectionState>,
    ) -> Self {
        let session = Session::new(ids, options.monitor_timeout, REFUSED_PAUSE);
        Self {
            endpoints,
            options,
            commands,
            state,
            session,
        }
    }

    pub(super) async fn run(mut self) {
        // Ends when the last client does, and with it everything that could be told.
        let Shutdown = self.reconnect_forever().await;
        self.session.disconnected("the client was shut down");
    }

    async fn reconnect_forever(&mut self) -> Shutdown {
        let mut delays = self.delays();
        for attempt in 0.. {
            let endpoint = self.endpoints.at(attempt).clone();
            let begun = Instant::now();
            let reason = match self.open(&endpoint).await {
                Ok(Ok(stream)) => match self.serve(&endpoint, stream).await {
                    End::Shutdown => break,
                    End::Lost(reason) => reason,
                },
                Ok(Err(reason)) => reason,
                Err(Shutdown) => break,
            };
            let was_ready = self.session.is_ready();
            self.session.disconnected(&reason);
            if was_ready {
                warn!(%endpoint, reason, "connection lost");
            } else {
                info!(%endpoint, reason, "cannot connect");
            }
            self.state.send_replace(ConnectionState::Connecting {
                last_error: Some(format!("{endpoint}: {reason}")),
            });
            // A connection that outlived the longest pause was a good one.
            if was_ready && begun.elapsed() > self.options.max_backoff {
                delays = self.delays();
                continue;
            }
            let pause = delays.next().unwrap_or(self.options.max_backoff);
            if self.while_offline(tokio::time::sleep(pause)).await.is_err() {
                break;
            }
        }
        Shutdown
    }

    fn delays(&self) -> backon::ExponentialBackoff {
        ExponentialBuilder::default()
            .with_min_delay(self.options.min_backoff)
            .with_max_delay(self.options.max_backoff)
            .with_jitter()
            .without_max_times()
            .build()
    }

    /// Takes commands while `work` goes on without a connection.
    async fn while_offline<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Shutdown> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                command = self.commands.recv() => match command {
                    Some(command) => self.session.command(command, Instant::now()),
                    None => return Err(Shutdown),
                },
            }
        }
    }

    async fn open(
        &mut self,
        endpoint: &Endpoint,
    ) -> Result<Result<Pin<Box<dyn Stream>>, String>, Shutdown> {
        let limit = self.options.connect_timeout;
        let opened = self.while_offline(timeout(limit, open(endpoint))).await?;
        Ok(match opened {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no connection within {limit:?}")),
        })
    }

    /// Runs one connection to its end.
    async fn serve(&mut self, endpoint: &Endpoint, stream: Pin<Box<dyn Stream>>) -> End {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut decoder = FrameDecoder::new(self.options.max_frame);
        let mut input = BytesMut::new();
        let mut liveness = Liveness::new(&self.options);
        self.session.connected();
        loop {
            input.reserve(READ_SIZE);
            let wakeup = self.session.next_wakeup();
            let deadline = liveness.deadline();
            let Some(out) = self.session.out() else {
                return End::Lost("the session has no connection".into());
            };
            if out.len() > MAX_UNWRITTEN {
                return End::Lost(format!("{} bytes that the server does not read", out.len()));
            }
            let step = tokio::select! {
                read = reader.read_buf(&mut input) => match read {
                    Ok(0) => Err(closed(&mut decoder, &mut input)),
                    Ok(_) => self.take_frames(&mut decoder, &mut input),
                    Err(error) => Err(error.to_string()),
                }
                .map(|()| liveness.heard()),
                written = writer.write_buf(out), if !out.is_empty() => match written {
                    Ok(0) => Err("the server reads no more".into()),
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                },
                command = self.commands.recv() => match command {
                    Some(command) => {
                        self.session.command(command, Instant::now());
                        Ok(())
                    }
                    None => return End::Shutdown,
                },
                () = sleep_until(deadline) => self.probe(&mut liveness),
                () = sleep_until(wakeup.unwrap_or(deadline)), if wakeup.is_some() => {
                    self.session.expire(Instant::now())
                }
            };
            if let Err(reason) = step {
                return End::Lost(reason);
            }
            if self.session.is_ready() && liveness.established() {
                debug!(%endpoint, "connected");
                self.state.send_replace(ConnectionState::Connected {
                    endpoint: endpoint.clone(),
                });
            }
        }
    }

    fn take_frames(
        &mut self,
        decoder: &mut FrameDecoder,
        input: &mut BytesMut,
    ) -> Result<(), String> {
        while let Some(frame) = decoder.decode(input).map_err(|error| error.to_string())? {
            self.session.received(&frame, Instant::now())?;
        }
        Ok(())
    }

    fn probe(&mut self, liveness: &mut Liveness) -> Result<(), String> {
        if liveness.probe_sent() {
            self.session.probe();
            Ok(())
        } else {
            Err(format!("no sign of life for {:?}", liveness.silence()))
        }
    }
}

/// When a silent server is probed, and when given up.
struct Liveness {
    interval: Duration,
    handshake: Duration,
    phase: Phase,
    /// When bytes last came, or we last were too busy to look.
    heard: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Handshake,
    Quiet,
    Probed,
}

impl Liveness {
    fn new(options: &ClientOptions) -> Self {
        Self {
            interval: options.probe_interval,
            handshake: options.connect_timeout,
            phase: Phase::Handshake,
            heard: Instant::now(),
        }
    }

    fn deadline(&self) -> Instant {
        self.heard
            + match self.phase {
                Phase::Handshake => self.handshake,
                Phase::Quiet => self.interval,
                Phase::Probed => self.interval * 2,
            }
    }

    /// Bytes came, and were dealt with: a part of a message is as good a sign as a whole one.
    fn heard(&mut self) {
        if self.phase != Phase::Handshake {
            self.heard = Instant::now();
            self.phase = Phase::Quiet;
        }
    }

    /// Moves past the handshake; true the first time.
    fn established(&mut self) -> bool {
        let first = self.phase == Phase::Handshake;
        if first {
            self.phase = Phase::Quiet;
            self.heard = Instant::now();
        }
        first
    }

    /// Moves on after silence; false when the probe was sent before.
    fn probe_sent(&mut self) -> bool {
        let first = self.phase == Phase::Quiet;
        if first {
            self.phase = Phase::Probed;
        }
        first
    }

    fn silence(&self) -> Duration {
        self.heard.elapsed()
    }
}

async fn open(endpoint: &Endpoint) -> io::Result<Pin<Box<dyn Stream>>> {
    Ok(match endpoint {
        Endpoint::Unix(path) => Box::pin(UnixStream::connect(path).await?),
        Endpoint::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            // Transactions are small and waited for.
            stream.set_nodelay(true)?;
            Box::pin(stream)
        }
    })
}

fn closed(decoder: &mut FrameDecoder, input: &mut BytesMut) -> String {
    match decoder.decode_eof(input) {
        Err(error @ FrameError::Truncated(_)) => error.to_string(),
        _ => "closed by the server".into(),
    }
}
