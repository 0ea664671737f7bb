//! A man in the middle: sees every message, refuses methods, cuts connections.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use ovsdb_rs::{Endpoint, FrameDecoder};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio_util::codec::FramedRead;

#[derive(Clone)]
pub(crate) struct Proxy {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    server: Endpoint,
    /// Answered here, as by a server that does not know it.
    unknown_method: Option<&'static str>,
    refusing: AtomicBool,
    /// Counts the cuts.
    cuts: watch::Sender<u64>,
    messages: watch::Sender<()>,
    log: Mutex<Vec<(From, Value)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Client,
    Server,
}

trait Pipe: AsyncRead + AsyncWrite + Send + Unpin {}

impl<P: AsyncRead + AsyncWrite + Send + Unpin> Pipe for P {}

type Boxed = Box<dyn Pipe>;

impl Proxy {
    pub(crate) async fn before(server: Endpoint, unknown_method: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap().to_string(),
            shared: Arc::new(Shared {
                server,
                unknown_method,
                refusing: AtomicBool::new(false),
                cuts: watch::Sender::new(0),
                messages: watch::Sender::new(()),
                log: Mutex::default(),
            }),
        };
        let shared = proxy.shared.clone();
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if !shared.refusing.load(Ordering::Relaxed) {
                    tokio::spawn(shared.clone().carry(client));
                }
            }
        });
        proxy
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.address.clone())
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Whether connections are closed as soon as they are made.
    pub(crate) fn refuse(&self, refusing: bool) {
        self.shared.refusing.store(refusing, Ordering::Relaxed);
    }

    /// What was seen so far.
    pub(crate) fn log(&self) -> Vec<(From, Value)> {
        self.shared.log.lock().unwrap().clone()
    }

    /// How many messages of `from` name `method`.
    pub(crate) fn count(&self, from: From, method: &str) -> usize {
        self.log()
            .iter()
            .filter(|(whose, message)| *whose == from && message["method"] == method)
            .count()
    }

    /// Waits until what was seen is as `wanted`.
    pub(crate) async fn until(&self, wanted: impl Fn(&Self) -> bool) {
        let mut messages = self.shared.messages.subscribe();
        while !wanted(self) {
            messages.changed().await.unwrap();
        }
    }
}

impl Shared {
    async fn carry(self: Arc<Self>, client: TcpStream) {
        let mut cuts = self.cuts.subscribe();
        let server: Boxed = match &self.server {
            Endpoint::Unix(path) => match UnixStream::connect(path).await {
                Ok(stream) => Box::new(stream),
                Err(_) => return,
            },
            Endpoint::Tcp(address) => Box::new(TcpStream::connect(address).await.unwrap()),
            other => panic!("{other}"),
        };
        let (from_client, mut to_client) = tokio::io::split(Box::new(client) as Boxed);
        let (from_server, mut to_server) = tokio::io::split(server);
        let (mut from_client, mut from_server) = (frames(from_client), frames(from_server));
        loop {
            let forwarded = tokio::select! {
                _ = cuts.changed() => return,
                Some(frame) = from_client.next() => {
                    let request = self.see(From::Client, &frame);
                    match request["method"].as_str() {
                        Some(method) if Some(method) == self.unknown_method => {
                            let answer = json!({
                                "id": request["id"], "result": null, "error": "unknown method",
                            });
                            write(&mut to_client, answer.to_string().into()).await
                        }
                        _ => write(&mut to_server, frame).await,
                    }
                }
                Some(frame) = from_server.next() => {
                    self.see(From::Server, &frame);
                    write(&mut to_client, frame).await
                }
                else => return,
            };
            if forwarded.is_err() {
                return;
            }
        }
    }

    fn see(&self, from: From, frame: &Bytes) -> Value {
        let message: Value = serde_json::from_slice(frame).unwrap();
        self.log.lock().unwrap().push((from, message.clone()));
        self.messages.send_replace(());
        message
    }
}

/// The frames up to the end of the stream, whatever ends it.
fn frames(reader: ReadHalf<Boxed>) -> impl Stream<Item = Bytes> + Unpin {
    FramedRead::new(reader, FrameDecoder::new(usize::MAX))
        .take_while(|frame| std::future::ready(frame.is_ok()))
        .map(Result::unwrap)
}

async fn write(writer: &mut WriteHalf<Boxed>, frame: Bytes) -> std::io::Result<()> {
    writer.write_all(&frame).await
}
