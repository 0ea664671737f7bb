//! A client of libvirt's remote protocol, as far as following events needs it.
//!
//! `virsh event` does not tell when it has registered, so a test that starts it and then a migration can miss the
//! beginning; a reply to a registration call can be awaited. The protocol is frames with an XDR body (RFC 4506); its
//! numbers are fixed for good, because clients and servers of different versions meet
//! (`src/remote/remote_protocol.x`, `qemu_protocol.x` and `src/rpc/virnetprotocol.x` in libvirt).

use std::{io, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

/// Procedures of libvirt's own program.
pub(crate) const REMOTE: u32 = 0x2000_8086;
/// Procedures that only the QEMU driver has.
pub(crate) const QEMU: u32 = 0x2000_8087;

/// A procedure: its program and its number there.
pub(crate) type Procedure = (u32, u32);

const CONNECT_OPEN: Procedure = (REMOTE, 1);

const VERSION: u32 = 1;
const TYPE_CALL: u32 = 0;
const TYPE_REPLY: u32 = 1;
const TYPE_MESSAGE: u32 = 2;
const STATUS_OK: u32 = 0;

/// Length word and six words of header.
const HEADER: usize = 28;
/// libvirt's own limit on a message (VIR_NET_MESSAGE_MAX and the length word).
const LONGEST: usize = 32 * 1024 * 1024 + 4;

/// A connection to a libvirt daemon.
pub(crate) struct Connection {
    stream: UnixStream,
    serial: u32,
    /// Messages that arrived while a reply was awaited.
    early: std::collections::VecDeque<Message>,
}

/// Something the server says unasked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) procedure: Procedure,
    pub(crate) body: Vec<u8>,
}

struct Frame {
    procedure: Procedure,
    kind: u32,
    serial: u32,
    status: u32,
    body: Vec<u8>,
}

/// Puts a body together.
#[derive(Default)]
pub(crate) struct Encoder(Vec<u8>);

/// Takes a body apart.
pub(crate) struct Decoder<'a>(&'a [u8]);

// === impl Connection ===

impl Connection {
    /// Connects to a daemon's socket and opens a driver's connection, such as `qemu:///system`.
    pub(crate) async fn open(socket: &Path, uri: &str) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .await
            .with_context(|| socket.display().to_string())?;
        let mut connection = Self {
            stream,
            serial: 0,
            early: std::collections::VecDeque::new(),
        };
        let body = Encoder::default().optional(Some(uri)).word(0);
        connection
            .call(CONNECT_OPEN, body)
            .await
            .with_context(|| format!("open {uri}"))?;
        Ok(connection)
    }

    /// Calls a procedure and returns the body of its reply.
    pub(crate) async fn call(&mut self, procedure: Procedure, body: Encoder) -> Result<Vec<u8>> {
        self.serial += 1;
        let frame = encode(&Frame {
            procedure,
            kind: TYPE_CALL,
            serial: self.serial,
            status: STATUS_OK,
            body: body.0,
        });
        self.stream
            .write_all(&frame)
            .await
            .context("write to libvirt")?;
        loop {
            let frame = self.read().await?;
            match frame.kind {
                TYPE_MESSAGE => self.early.push_back(Message {
                    procedure: frame.procedure,
                    body: frame.body,
                }),
                TYPE_REPLY if frame.serial == self.serial && frame.status == STATUS_OK => {
                    return Ok(frame.body);
                }
                TYPE_REPLY if frame.serial == self.serial => {
                    bail!("libvirt: {}", error_text(&frame.body))
                }
                kind => bail!(
                    "libvirt answered call {} with type {kind}, serial {}",
                    self.serial,
                    frame.serial
                ),
            }
        }
    }

    /// The next message.
    pub(crate) async fn message(&mut self) -> Result<Message> {
        if let Some(message) = self.early.pop_front() {
            return Ok(message);
        }
        loop {
            let frame = self.read().await?;
            if frame.kind == TYPE_MESSAGE {
                return Ok(Message {
                    procedure: frame.procedure,
                    body: frame.body,
                });
            }
        }
    }

    async fn read(&mut self) -> Result<Frame> {
        let length = self.stream.read_u32().await.map_err(closed)?;
        let length = usize::try_from(length).context("length of a message")?;
        ensure!(
            (HEADER..=LONGEST).contains(&length),
            "libvirt announced a message of {length} bytes"
        );
        let mut frame = vec![0; length - 4];
        self.stream.read_exact(&mut frame).await.map_err(closed)?;
        decode(&frame)
    }
}

fn closed(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => anyhow::anyhow!("libvirt closed the connection"),
        _ => anyhow::Error::new(error).context("read from libvirt"),
    }
}

fn encode(frame: &Frame) -> Vec<u8> {
    let (program, number) = frame.procedure;
    let length = u32::try_from(HEADER + frame.body.len()).unwrap_or(u32::MAX);
    let header = [
        length,
        program,
        VERSION,
        number,
        frame.kind,
        frame.serial,
        frame.status,
    ];
    header
        .into_iter()
        .flat_map(u32::to_be_bytes)
        .chain(frame.body.iter().copied())
        .collect()
}

/// Takes a frame apart, without its length word.
fn decode(bytes: &[u8]) -> Result<Frame> {
    let mut header = Decoder(bytes);
    let program = header.word()?;
    let version = header.word()?;
    let number = header.word()?;
    let (kind, serial, status) = (header.word()?, header.word()?, header.word()?);
    ensure!(
        version == VERSION,
        "libvirt speaks version {version} of program {program:#x}"
    );
    Ok(Frame {
        procedure: (program, number),
        kind,
        serial,
        status,
        body: header.0.to_vec(),
    })
}

/// The text of libvirt's error structure: two numbers, then an optional string.
fn error_text(body: &[u8]) -> String {
    let mut body = Decoder(body);
    let text = (|| {
        let (code, _domain) = (body.word()?, body.word()?);
        anyhow::Ok(body.optional()?.unwrap_or_else(|| format!("error {code}")))
    })();
    text.unwrap_or_else(|_| "an error that cannot be read".to_owned())
}

// === impl Encoder ===

impl Encoder {
    pub(crate) fn word(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// A string that may be absent.
    pub(crate) fn optional(self, value: Option<&str>) -> Self {
        let Some(text) = value else {
            return self.word(0);
        };
        let mut with = self
            .word(1)
            .word(u32::try_from(text.len()).unwrap_or(u32::MAX));
        with.0.extend_from_slice(text.as_bytes());
        with.0.resize(with.0.len().next_multiple_of(4), 0);
        with
    }
}

// === impl Decoder ===

impl<'a> Decoder<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    pub(crate) fn word(&mut self) -> Result<u32> {
        let (word, rest) = self
            .0
            .split_first_chunk()
            .context("a message from libvirt is too short")?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*word))
    }

    pub(crate) fn long(&mut self) -> Result<u64> {
        Ok(u64::from(self.word()?) << 32 | u64::from(self.word()?))
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        // XDR fills up to four bytes.
        let padded = length
            .checked_next_multiple_of(4)
            .context("length in a message from libvirt")?;
        let (bytes, rest) = self
            .0
            .split_at_checked(padded)
            .context("a message from libvirt is too short")?;
        self.0 = rest;
        bytes
            .get(..length)
            .context("a message from libvirt is too short")
    }

    pub(crate) fn string(&mut self) -> Result<String> {
        let length = usize::try_from(self.word()?).context("length of a string")?;
        String::from_utf8(self.bytes(length)?.to_vec())
            .context("a string from libvirt is not UTF-8")
    }

    pub(crate) fn optional(&mut self) -> Result<Option<String>> {
        match self.word()? {
            0 => Ok(None),
            _ => self.string().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (
            Connection {
                stream: ours,
                serial: 0,
                early: std::collections::VecDeque::new(),
            },
            theirs,
        )
    }

    fn frame(kind: u32, serial: u32, status: u32, body: Encoder) -> Vec<u8> {
        encode(&Frame {
            procedure: (REMOTE, 318),
            kind,
            serial,
            status,
            body: body.0,
        })
    }

    #[tokio::test]
    async fn a_message_that_comes_before_the_reply_is_not_lost() {
        let (mut connection, mut server) = pair();
        let both = [
            frame(TYPE_MESSAGE, 0, STATUS_OK, Encoder::default().word(7)),
            frame(TYPE_REPLY, 1, STATUS_OK, Encoder::default().word(42)),
        ];
        server.write_all(&both.concat()).await.unwrap();
        assert_eq!(
            connection
                .call((REMOTE, 316), Encoder::default())
                .await
                .unwrap(),
            42u32.to_be_bytes()
        );
        assert_eq!(connection.message().await.unwrap().body, 7u32.to_be_bytes());
    }

    #[tokio::test]
    async fn an_error_reply_carries_libvirts_text() {
        let (mut connection, mut server) = pair();
        let body = Encoder::default()
            .word(38)
            .word(7)
            .optional(Some("Cannot recv data"));
        server
            .write_all(&frame(TYPE_REPLY, 1, 1, body))
            .await
            .unwrap();
        let error = connection
            .call((REMOTE, 1), Encoder::default())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("Cannot recv data"), "{error}");
    }

    #[tokio::test]
    async fn nonsense_and_truncation_are_errors() {
        for nonsense in [&[0, 0, 0, 3][..], &[0xff; 4], &[0, 0, 0, 28, 1, 2]] {
            let (mut connection, mut server) = pair();
            server.write_all(nonsense).await.unwrap();
            drop(server);
            assert!(
                connection.message().await.is_err(),
                "{nonsense:?} was accepted"
            );
        }
    }

    #[test]
    fn strings_are_padded_and_read_back() {
        let body = Encoder::default()
            .optional(Some("abcde"))
            .optional(None)
            .word(9)
            .0;
        assert_eq!(body.len(), 4 + 4 + 8 + 4 + 4);
        let mut decoder = Decoder(&body);
        assert_eq!(decoder.optional().unwrap().as_deref(), Some("abcde"));
        assert_eq!(decoder.optional().unwrap(), None);
        assert_eq!(decoder.word().unwrap(), 9);
        assert!(decoder.word().is_err());
        assert!(Decoder(&[0xff; 8]).string().is_err());
    }
}
