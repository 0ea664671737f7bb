//! Calls, replies and messages over one socket.

use std::collections::VecDeque;
use std::path::Path;

use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::UnixStream;

use crate::xdr::{Decoder, Encoder};
use crate::{Error, Event};

/// A program and a number there.
pub(crate) type Procedure = (u32, u32);

/// libvirt's own program, and that which only its QEMU driver has.
const REMOTE: u32 = 0x2000_8086;
const QEMU: u32 = 0x2000_8087;

const CONNECT_OPEN: Procedure = (REMOTE, 1);
const LIFECYCLE_REGISTER: Procedure = (REMOTE, 316);
pub(crate) const LIFECYCLE: Procedure = (REMOTE, 318);
const MONITOR_REGISTER: Procedure = (QEMU, 4);
pub(crate) const MONITOR: Procedure = (QEMU, 6);

/// `VIR_DOMAIN_EVENT_ID_LIFECYCLE`.
const LIFECYCLE_EVENTS: u32 = 0;
/// `VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX`.
const REGEX: u32 = 1;

const VERSION: u32 = 1;
const TYPE_CALL: u32 = 0;
const TYPE_REPLY: u32 = 1;
const TYPE_MESSAGE: u32 = 2;
const STATUS_OK: u32 = 0;

/// Length word and six words of header.
const HEADER: usize = 28;
/// Events and the replies to what is called here have below a kilobyte; libvirt's own limit is 32 MiB.
const LONGEST: usize = 16 << 10;
/// Messages that are kept while a reply is awaited, which is a moment.
const MOST_WAITING: usize = 64;
/// Characters of a refusal that are kept.
const MOST_TEXT: usize = 300;

/// A connection to a daemon, as long as it is not dropped.
#[derive(Debug)]
pub struct Connection<S = UnixStream> {
    stream: BufReader<S>,
    serial: u32,
    /// Messages that came while a reply was awaited.
    waiting: VecDeque<Frame>,
}

#[derive(Debug)]
struct Frame {
    procedure: Procedure,
    kind: u32,
    serial: u32,
    status: u32,
    body: Vec<u8>,
}

impl Connection {
    /// Connects to a daemon's socket, and there to a driver such as `qemu:///system`.
    ///
    /// # Errors
    /// [`Error::Refused`] where the daemon has no such driver for this client; [`Error::Io`].
    pub async fn open(socket: &Path, uri: &str) -> Result<Self, Error> {
        Self::over(UnixStream::connect(socket).await?, uri).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Likewise, over a stream that leads to the daemon.
    ///
    /// # Errors
    /// As [`open`](Connection::open).
    pub async fn over(stream: S, uri: &str) -> Result<Self, Error> {
        let mut connection = Self {
            stream: BufReader::new(stream),
            serial: 0,
            waiting: VecDeque::new(),
        };
        let body = Encoder::default().optional(Some(uri)).word(0);
        connection.call(CONNECT_OPEN, body).await?;
        Ok(connection)
    }

    /// Asks for the lifecycle events of all domains.
    ///
    /// # Errors
    /// [`Error::Refused`] where this client may not have them.
    pub async fn hear_lifecycle(&mut self) -> Result<(), Error> {
        let any_domain = Encoder::default().word(LIFECYCLE_EVENTS).word(0);
        self.call(LIFECYCLE_REGISTER, any_domain).await?;
        Ok(())
    }

    /// Asks for those events of the monitors of all domains' QEMUs whose names match a regular expression. The
    /// connection has to be one that may write (`connect:write`). They come before libvirt has acted on them.
    ///
    /// # Errors
    /// [`Error::Refused`] where this client may not have them, or the driver is not QEMU's.
    pub async fn hear_monitors(&mut self, names: &str) -> Result<(), Error> {
        let any_domain = Encoder::default().word(0);
        let body = any_domain.optional(Some(names)).word(REGEX);
        self.call(MONITOR_REGISTER, body).await?;
        Ok(())
    }

    /// The next event. Not cancel safe: after a call that was dropped the connection is good for nothing.
    ///
    /// # Errors
    /// Anything but [`Error::Refused`]; the connection is over.
    pub async fn event(&mut self) -> Result<Event, Error> {
        loop {
            let frame = match self.waiting.pop_front() {
                Some(frame) => frame,
                None => self.read().await?,
            };
            if frame.kind != TYPE_MESSAGE {
                return Err(Error::Malformed("a message that nobody asked for"));
            }
            // Of a kind that a later libvirt may have.
            if let Some(event) = Event::read(frame.procedure, &frame.body)? {
                return Ok(event);
            }
        }
    }

    async fn call(&mut self, procedure: Procedure, body: Encoder) -> Result<Vec<u8>, Error> {
        self.serial = self.serial.wrapping_add(1);
        let frame = Frame {
            procedure,
            kind: TYPE_CALL,
            serial: self.serial,
            status: STATUS_OK,
            body: body.bytes(),
        };
        self.stream.write_all(&encode(&frame)).await?;
        loop {
            let frame = self.read().await?;
            match frame.kind {
                TYPE_MESSAGE if self.waiting.len() < MOST_WAITING => self.waiting.push_back(frame),
                TYPE_MESSAGE => {}
                TYPE_REPLY if frame.serial != self.serial => {
                    return Err(Error::Malformed("a reply to what was not called"));
                }
                TYPE_REPLY if frame.status == STATUS_OK => return Ok(frame.body),
                TYPE_REPLY => return Err(refusal(&frame.body)),
                _ => return Err(Error::Malformed("a message of another type")),
            }
        }
    }

    async fn read(&mut self) -> Result<Frame, Error> {
        if self.stream.fill_buf().await?.is_empty() {
            return Err(Error::Closed);
        }
        let length = self.stream.read_u32().await?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if !(HEADER..=LONGEST).contains(&length) {
            return Err(Error::Malformed("the length of a message"));
        }
        let rest = length - 4;
        // Grows with what comes: a length is only a promise.
        let mut frame = Vec::new();
        let limit = u64::try_from(rest).unwrap_or(u64::MAX);
        let read = (&mut self.stream)
            .take(limit)
            .read_to_end(&mut frame)
            .await?;
        if read < rest {
            return Err(Error::Closed);
        }
        decode(&frame)
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
    let header = header.into_iter().flat_map(u32::to_be_bytes);
    header.chain(frame.body.iter().copied()).collect()
}

/// Takes a frame apart, without its length.
fn decode(bytes: &[u8]) -> Result<Frame, Error> {
    let mut header = Decoder::new(bytes);
    let (program, version, number) = (header.word()?, header.word()?, header.word()?);
    let (kind, serial, status) = (header.word()?, header.word()?, header.word()?);
    if version != VERSION {
        return Err(Error::Malformed("another version of it"));
    }
    Ok(Frame {
        procedure: (program, number),
        kind,
        serial,
        status,
        body: header.rest().to_vec(),
    })
}

/// libvirt's error structure: its number, whose it is, then its words if it has any.
fn refusal(body: &[u8]) -> Error {
    let mut body = Decoder::new(body);
    let read = (|| {
        let (code, _domain) = (body.word()?, body.word()?);
        let text = body.optional()?;
        Ok(Error::Refused {
            code,
            text: match text {
                Some(text) => text.escape_debug().take(MOST_TEXT).collect(),
                None => format!("error {code}"),
            },
        })
    })();
    read.unwrap_or_else(|error: Error| error)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use tokio::io::DuplexStream;

    use super::*;

    fn pair() -> (Connection<DuplexStream>, DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let connection = Connection {
            stream: BufReader::new(ours),
            serial: 0,
            waiting: VecDeque::new(),
        };
        (connection, theirs)
    }

    fn frame(procedure: Procedure, kind: u32, serial: u32, status: u32, body: Encoder) -> Vec<u8> {
        encode(&Frame {
            procedure,
            kind,
            serial,
            status,
            body: body.bytes(),
        })
    }

    fn lifecycle(event: u32) -> Vec<u8> {
        let uuid_and_id = |body: Encoder| (0..5).fold(body, Encoder::word);
        // A callback, and a string, which is an optional one without its first word.
        let body = uuid_and_id(Encoder::default().optional(Some("vm1")));
        frame(
            LIFECYCLE,
            TYPE_MESSAGE,
            0,
            STATUS_OK,
            body.word(event).word(0),
        )
    }

    #[tokio::test]
    async fn an_event_that_comes_before_the_reply_is_not_lost() {
        let (mut connection, mut daemon) = pair();
        let reply = frame(
            LIFECYCLE_REGISTER,
            TYPE_REPLY,
            1,
            STATUS_OK,
            Encoder::default(),
        );
        let all = [lifecycle(3), reply, lifecycle(4)].concat();
        daemon.write_all(&all).await.unwrap();
        connection.hear_lifecycle().await.unwrap();
        for event in [3, 4] {
            let heard = connection.event().await.unwrap();
            let what = crate::Happening::Lifecycle { event, detail: 0 };
            assert_eq!((heard.domain.as_str(), heard.what), ("vm1", what));
        }
    }

    #[tokio::test]
    async fn what_is_called_is_what_libvirt_reads() {
        let (mut connection, mut daemon) = pair();
        let reply = frame(
            MONITOR_REGISTER,
            TYPE_REPLY,
            1,
            STATUS_OK,
            Encoder::default(),
        );
        daemon.write_all(&reply).await.unwrap();
        connection.hear_monitors("^STOP$").await.unwrap();
        let mut called = vec![0; HEADER + 4 + 4 + 4 + 8 + 4];
        daemon.read_exact(&mut called).await.unwrap();
        let words: Vec<u32> = called
            .chunks(4)
            .map(|word| u32::from_be_bytes(word.try_into().unwrap()))
            .collect();
        let name = [0x5e53_544f, 0x5024_0000];
        assert_eq!(
            words,
            [
                &[52, QEMU, 1, 4, TYPE_CALL, 1, STATUS_OK, 0, 1, 6][..],
                &name,
                &[REGEX]
            ]
            .concat()
        );
    }

    #[tokio::test]
    async fn a_refusal_carries_libvirts_words() {
        let (mut connection, mut daemon) = pair();
        let body = Encoder::default().word(29).word(7);
        let body = body.optional(Some("read only access prevents it"));
        let reply = frame(LIFECYCLE_REGISTER, TYPE_REPLY, 1, 1, body);
        daemon.write_all(&reply).await.unwrap();
        let error = connection.hear_lifecycle().await.unwrap_err();
        assert!(
            matches!(error, Error::Refused { code: 29, .. }),
            "{error:?}"
        );
        assert_eq!(error.to_string(), "libvirt: read only access prevents it");
    }

    #[rstest]
    #[case::a_length_below_the_headers(&[0, 0, 0, 3])]
    #[case::a_length_of_gigabytes(&[0xff; 4])]
    #[case::an_end_within_a_message(&[0, 0, 0, 28, 1, 2])]
    #[case::an_end_within_a_length(&[0, 0])]
    #[case::nothing(&[])]
    #[tokio::test]
    async fn nonsense_and_truncation_are_errors(#[case] bytes: &[u8]) {
        let (mut connection, mut daemon) = pair();
        daemon.write_all(bytes).await.unwrap();
        drop(daemon);
        assert!(connection.event().await.is_err());
    }
}
