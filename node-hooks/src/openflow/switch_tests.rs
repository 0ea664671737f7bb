use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use rstest::rstest;
use tokio::io::{AsyncReadExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};

use super::*;
use crate::openflow::blocks::tests::{SHUT_IN, SHUT_OUT};
use arp_proxy::Mac;

const MAC: Mac = pnet_base::MacAddr(0x52, 0x54, 0, 1, 2, 3);
/// More than anything here writes.
const AMPLE: usize = 1 << 16;

/// A switch played by a test.
struct Peer(DuplexStream);

/// Header and body.
#[derive(Debug, PartialEq, Eq)]
struct Heard {
    version: u8,
    kind: u8,
    xid: u32,
    body: Vec<u8>,
}

impl Peer {
    async fn hear(&mut self) -> Heard {
        self.try_hear().await.expect("the connection has ended")
    }

    async fn try_hear(&mut self) -> io::Result<Heard> {
        let mut header = [0; 8];
        self.0.read_exact(&mut header).await?;
        let [version, kind, high, low, xid @ ..] = header;
        let mut body = vec![0; usize::from(u16::from_be_bytes([high, low])) - 8];
        self.0.read_exact(&mut body).await?;
        Ok(Heard {
            version,
            kind,
            xid: u32::from_be_bytes(xid),
            body,
        })
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    async fn tell(&mut self, version: u8, kind: u8, xid: u32, body: &[u8]) {
        let message = told(version, kind, xid, body);
        self.say(&message).await;
    }
}

/// Sends one frame.
fn packet_out(switch: &Switch, in_port: u32, frame: &[u8]) -> Result<Sent, Error> {
    let mut packets = PacketOuts::new();
    packets.push(in_port, frame.to_vec())?;
    switch.send(&packets)
}

fn told(version: u8, kind: u8, xid: u32, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + body.len()).unwrap().to_be_bytes();
    [&[version, kind], &length[..], &xid.to_be_bytes(), body].concat()
}

fn halves(room: usize) -> (Peer, ReadHalf<DuplexStream>, WriteHalf<DuplexStream>) {
    let (ours, theirs) = duplex(room);
    let (read, write) = split(ours);
    (Peer(theirs), read, write)
}

/// A connection of a version, with so much room in each direction.
async fn connected_with(room: usize, version: u8) -> (Peer, Switch) {
    let (mut peer, read, write) = halves(room);
    let greeting = Switch::greet("test", read, write);
    let (switch, ()) = tokio::join!(greeting, async {
        let hello = peer.hear().await;
        assert_eq!((hello.version, hello.kind), (6, 0));
        peer.tell(version, 0, 99, b"").await;
    });
    let switch = switch.unwrap();
    assert_eq!(switch.version().number(), version);
    (peer, switch)
}

async fn connected(version: u8) -> (Peer, Switch) {
    connected_with(AMPLE, version).await
}

/// What a greeting comes to, if this is the answer.
async fn greeted(answer: &[u8]) -> Result<Switch, Error> {
    let (mut peer, read, write) = halves(AMPLE);
    peer.say(answer).await;
    let outcome = Switch::greet("test", read, write).await;
    drop(peer);
    outcome
}

#[rstest]
#[case::older(b"\x04\x00\x00\x08\x00\x00\x00\x01", Version::V13)]
#[case::newer(b"\x07\x00\x00\x08\x00\x00\x00\x01", Version::V15)]
#[case::listed(
    b"\x06\x00\x00\x10\x00\x00\x00\x01\x00\x01\x00\x08\x00\x00\x00\x0a",
    Version::V12
)]
#[tokio::test(start_paused = true)]
async fn the_newest_common_version_is_agreed_on(#[case] hello: &[u8], #[case] version: Version) {
    assert_eq!(greeted(hello).await.unwrap().version(), version);
}

#[tokio::test(start_paused = true)]
async fn who_speaks_nothing_of_ours_is_told_apart() {
    let newer = b"\x07\x00\x00\x10\x00\x00\x00\x01\x00\x01\x00\x08\x00\x00\x00\x80";
    let error = greeted(newer).await.unwrap_err();
    assert!(matches!(error, Error::Versions { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("speaks OpenFlow 1.6,") && text.contains("1.0, 1.1"),
        "{text}"
    );

    let refusing = told(1, 1, 1, b"\0\0\0\0We support version 0x01.");
    let error = greeted(&refusing).await.unwrap_err();
    assert!(matches!(error, Error::RefusedConnection(_)), "{error:?}");
    assert!(error.to_string().contains("We support version 0x01."));

    let error = greeted(b"\x06\x00\x00\x04\x00\x00\x00\x01")
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error:?}");
    let error = greeted(&told(4, 10, 1, b"")).await.unwrap_err();
    assert!(
        matches!(error, Error::NoSwitch { kind: 10, .. }),
        "{error:?}"
    );

    let (peer, read, write) = halves(AMPLE);
    drop(peer);
    let error = Switch::greet("test", read, write).await.unwrap_err();
    assert!(matches!(error, Error::Closed | Error::Lost(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_not_waited_for() {
    let (_peer, read, write) = halves(AMPLE);
    let error = Switch::greet("test", read, write).await.unwrap_err();
    assert!(matches!(error, Error::NoHello { .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn packets_and_a_barrier_are_one_write() {
    let (mut peer, switch) = connected(4).await;
    let ports = PacketOuts::opening([(7, MAC), (8, MAC)]).unwrap();
    // Written before anybody else has had a chance to run.
    let sent = switch.send(&ports).unwrap();
    let written = sent.written_at_once().expect("there is room");
    let first = peer.hear().await;
    let second = peer.hear().await;
    let barrier = peer.hear().await;
    assert_eq!((first.version, first.kind, first.xid), (4, 13, 1));
    assert_eq!(first.body[..8], *b"\xff\xff\xff\xff\0\0\0\x07");
    assert_eq!((second.kind, second.xid), (13, 2));
    assert_eq!(second.body[..8], *b"\xff\xff\xff\xff\0\0\0\x08");
    assert_eq!((barrier.kind, barrier.xid), (20, 3));
    peer.tell(4, 21, 3, b"").await;
    let processed = sent.processed().await.unwrap();
    assert!(processed >= written);
}

#[tokio::test(start_paused = true)]
async fn answers_find_who_waits_for_them_in_any_order() {
    let (mut peer, switch) = connected(1).await;
    let first = packet_out(&switch, 1, b"one").unwrap();
    let second = packet_out(&switch, 2, b"two").unwrap();
    for _ in 0..4 {
        peer.hear().await;
    }
    // One that nobody asked for, and both together, cut in the middle.
    let replies = [
        told(1, 19, 77, b""),
        told(1, 19, 4, b""),
        told(1, 19, 2, b""),
    ]
    .concat();
    for piece in replies.chunks(5) {
        peer.say(piece).await;
    }
    first.processed().await.unwrap();
    second.processed().await.unwrap();
    // Transactions go on where they were.
    let barrier = tokio::spawn({
        let switch = switch.clone();
        async move { switch.barrier().await }
    });
    let asked = peer.hear().await;
    assert_eq!((asked.kind, asked.xid), (18, 5));
    peer.tell(1, 19, 5, b"").await;
    barrier.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_refusal_names_the_port() {
    let (mut peer, switch) = connected(5).await;
    let ports = PacketOuts::opening([(7, MAC), (8, MAC), (9, MAC)]).unwrap();
    let sent = switch.send(&ports).unwrap();
    let other = packet_out(&switch, 10, b"").unwrap();
    // The second is refused: bad request, bad port, and the head of the message.
    peer.tell(5, 1, 2, b"\0\x01\0\x0b\x05\x0d\0\x60\0\0\0\x02")
        .await;
    // Of nothing that was sent.
    peer.tell(5, 1, 77, b"\0\x01\0\x05").await;
    peer.tell(5, 21, 4, b"").await;
    peer.tell(5, 21, 6, b"").await;
    let error = sent.processed().await.unwrap_err();
    assert!(
        matches!(error, Error::RefusedPacketOut { in_port: 8, .. }),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "the switch refuses a packet-out with in_port 8: there is no such port (OFPBRC_BAD_PORT)"
    );
    other.processed().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_barrier_that_is_refused_is_not_waited_for() {
    let (mut peer, switch) = connected(1).await;
    let sent = packet_out(&switch, 1, b"").unwrap();
    peer.tell(1, 1, 2, b"\0\x01\0\x01").await;
    let error = sent.processed().await.unwrap_err();
    assert!(matches!(error, Error::RefusedBarrier(_)), "{error:?}");
    assert!(switch.is_alive());
}

#[tokio::test(start_paused = true)]
async fn echoes_are_answered_and_everything_else_is_passed_over() {
    let (mut peer, _switch) = connected(4).await;
    // A packet-in, a port status, another hello, something new.
    for kind in [10, 12, 0, 200] {
        peer.tell(4, kind, 5, &[0; 100]).await;
    }
    peer.tell(4, 2, 0xdead_beef, b"are you there?").await;
    let echo = Heard {
        version: 4,
        kind: 3,
        xid: 0xdead_beef,
        body: b"are you there?".to_vec(),
    };
    assert_eq!(peer.hear().await, echo);
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_answers_echoes_is_kept_and_one_that_does_not_is_left() {
    let (mut peer, switch) = connected(4).await;
    let began = Instant::now();
    for _ in 0..3 {
        let probe = peer.hear().await;
        assert_eq!((probe.kind, probe.body.len()), (2, 0));
        peer.tell(4, 3, probe.xid, b"").await;
    }
    assert_eq!(began.elapsed(), 3 * PROBE);
    let sent = packet_out(&switch, 1, b"").unwrap();
    let error = sent.processed().await.unwrap_err();
    assert!(matches!(error, Error::Silent(_)), "{error:?}");
    assert_eq!(began.elapsed(), 5 * PROBE);
    assert!(!switch.is_alive());
    assert!(matches!(packet_out(&switch, 1, b""), Err(Error::Silent(_))));
    assert!(matches!(switch.ended().await, Error::Silent(_)));
}

#[rstest]
#[case::too_short(b"\x04\x15\x00\x07\x00\x00\x00\x02")]
#[case::of_no_length(b"\x04\x15\x00\x00\x00\x00\x00\x02")]
#[case::another_version(b"\x05\x15\x00\x08\x00\x00\x00\x02")]
#[tokio::test(start_paused = true)]
async fn nonsense_ends_the_connection(#[case] nonsense: &[u8]) {
    let (mut peer, switch) = connected(4).await;
    let sent = packet_out(&switch, 1, b"").unwrap();
    peer.say(nonsense).await;
    let error = sent.processed().await.unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_hangs_up_fails_what_was_sent() {
    let (mut peer, switch) = connected(4).await;
    let sent = packet_out(&switch, 1, b"").unwrap();
    // In the middle of its answer.
    peer.say(b"\x04\x15\x00").await;
    drop(peer);
    let error = sent.processed().await.unwrap_err();
    assert!(matches!(error, Error::Lost(_)), "{error:?}");
    let (peer, switch_) = connected(4).await;
    drop(peer);
    assert!(matches!(switch_.ended().await, Error::Closed));
    assert!(packet_out(&switch_, 1, b"").is_err());
    drop(switch);
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_is_written_in_order_and_whole() {
    let (mut peer, switch) = connected_with(64, 4).await;
    let mut first = packet_out(&switch, 1, &[1; 200]).unwrap();
    assert_eq!(first.written_at_once(), None);
    let second = packet_out(&switch, 2, &[2; 50]).unwrap();
    assert_eq!(second.written_at_once(), None);
    // Who loses patience cuts nothing short.
    let patience = Duration::from_secs(1);
    assert!(timeout(patience, first.written()).await.is_err());
    drop(first);
    let mut second = second;
    let (heard, written) = tokio::join!(
        async {
            let mut heard = Vec::new();
            for _ in 0..4 {
                heard.push(peer.hear().await);
            }
            heard
        },
        second.written()
    );
    written.unwrap();
    assert!(heard[0].body.ends_with(&[1; 200]));
    assert!(heard[2].body.ends_with(&[2; 50]));
    let kinds: Vec<u8> = heard.iter().map(|message| message.kind).collect();
    assert_eq!(kinds, [13, 20, 13, 20]);
    peer.tell(4, 21, 4, b"").await;
    second.processed().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_does_not_read_fills_no_memory() {
    let (_peer, switch) = connected_with(64, 4).await;
    let frame = vec![0; 60_000];
    let sent: Vec<_> = std::iter::repeat_with(|| packet_out(&switch, 1, &frame))
        .take(100)
        .collect();
    let taken = sent.iter().filter(|sent| sent.is_ok()).count();
    assert!((10..30).contains(&taken), "{taken}");
    assert!(matches!(sent.last(), Some(Err(Error::Stuck(_)))));
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_asks_and_does_not_read_is_left() {
    let (mut peer, switch) = connected_with(64, 4).await;
    let question = told(4, 2, 1, &vec![0; 30_000]);
    let asking = async {
        loop {
            peer.say(&question).await;
        }
    };
    let error = tokio::select! {
        () = asking => unreachable!(),
        error = switch.ended() => error,
    };
    assert!(matches!(error, Error::Stuck(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_replies_to_no_barriers_is_not_asked_for_ever() {
    let (mut peer, switch) = connected(4).await;
    let reading = tokio::spawn(async move { while peer.try_hear().await.is_ok() {} });
    let mut asked = 0;
    let error = loop {
        match switch.send(&PacketOuts::new()) {
            Ok(_) => asked += 1,
            Err(error) => break error,
        }
        tokio::task::yield_now().await;
    };
    assert!(matches!(error, Error::Stuck(_)), "{error:?}");
    assert_eq!(asked, 1024);
    drop(switch);
    reading.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_connection_lasts_as_long_as_somebody_waits() {
    let (mut peer, switch) = connected(4).await;
    let sent = packet_out(&switch, 1, b"").unwrap();
    drop(switch);
    peer.hear().await;
    let barrier = peer.hear().await;
    peer.tell(4, 21, barrier.xid, b"").await;
    sent.processed().await.unwrap();
    let end = peer.try_hear().await.unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
}

/// A stream that can be read, and written to never again.
struct Broken;

impl AsyncWrite for Broken {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_fails_is_told_at_once_and_ends_the_connection() {
    let (peer, read, _write) = halves(AMPLE);
    let core = Arc::new(Core::new(Version::V13, Box::new(Broken)));
    let driver = tokio::spawn(drive(core.clone(), FramedRead::new(read, Codec))).abort_handle();
    let switch = Switch(Arc::new(Connection {
        core,
        version: Version::V13,
        driver: driver.clone(),
    }));
    let error = packet_out(&switch, 1, b"").unwrap_err();
    assert!(matches!(error, Error::Lost(_)), "{error:?}");
    assert!(!switch.is_alive());
    // The task behind finds out too, with nothing to read.
    while !driver.is_finished() {
        tokio::task::yield_now().await;
    }
    drop(peer);
}

/// Of an answer in parts: flows, flags, padding.
const MORE_FLOWS: &[u8] = b"\0\x01\0\x01\0\0\0\0";
const LAST_FLOWS: &[u8] = b"\0\x01\0\0\0\0\0\0";

impl Peer {
    /// Hears a question about flows, and tells its transaction and what it is about: port or cookie.
    async fn is_asked(&mut self) -> (u32, u64) {
        let Heard {
            kind, xid, body, ..
        } = self.hear().await;
        assert_eq!((kind, &body[..8]), (18, LAST_FLOWS));
        let word = |place: usize| u32::from_be_bytes(body[place..place + 4].try_into().unwrap());
        let about = match body.len() {
            // All tables, and a match of nothing.
            48 => word(28),
            _ => word(48),
        };
        (xid, about.into())
    }

    async fn answers(&mut self, xid: u32, header: &[u8], flows: &[&[u8]]) {
        let body = [header, &flows.concat()].concat();
        self.tell(4, 19, xid, &body).await;
    }

    /// Tells all that shuts port 7.
    async fn answers_both(&mut self) {
        let (xid, port) = self.is_asked().await;
        assert_eq!(port, 7);
        self.answers(xid, LAST_FLOWS, &[SHUT_IN]).await;
        let (xid, cookie) = self.is_asked().await;
        assert_eq!(cookie, 0xc0de_c0de);
        self.answers(xid, LAST_FLOWS, &[SHUT_IN, SHUT_OUT]).await;
    }
}

/// What shuts port 7 of a switch that answers.
async fn found(peer: &mut Peer, switch: &Switch) -> Vec<Block> {
    let (blocks, ()) = tokio::join!(switch.blocks(7), peer.answers_both());
    blocks.unwrap()
}

/// The question that is asked meanwhile, and what becomes of it.
async fn asking(switch: &Switch) -> tokio::task::JoinHandle<Result<Vec<Block>, Error>> {
    let switch = switch.clone();
    let asking = tokio::spawn(async move { switch.blocks(7).await });
    tokio::task::yield_now().await;
    asking
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_taken_in_parts() {
    let (mut peer, switch) = connected(4).await;
    let asking = asking(&switch).await;
    let (xid, _) = peer.is_asked().await;
    peer.answers(xid, MORE_FLOWS, &[]).await;
    peer.answers(xid, MORE_FLOWS, &[SHUT_OUT, SHUT_OUT]).await;
    // Of a question that nobody asked.
    peer.answers(77, LAST_FLOWS, &[]).await;
    peer.answers(xid, LAST_FLOWS, &[SHUT_IN]).await;
    // Once an answer is whole nothing more belongs to it.
    peer.answers(xid, LAST_FLOWS, &[b"nonsense"]).await;
    let (xid, cookie) = peer.is_asked().await;
    assert_eq!(cookie, 0xc0de_c0de);
    peer.answers(xid, MORE_FLOWS, &[SHUT_IN]).await;
    assert!(!asking.is_finished());
    peer.answers(xid, LAST_FLOWS, &[SHUT_OUT]).await;
    let blocks = asking.await.unwrap().unwrap();
    assert_eq!(blocks, found(&mut peer, &switch).await);
    assert_eq!(blocks.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_port_that_nothing_shuts_takes_one_question() {
    let (mut peer, switch) = connected(4).await;
    let (blocks, ()) = tokio::join!(switch.blocks(8), async {
        let (xid, port) = peer.is_asked().await;
        assert_eq!(port, 8);
        // Of another port, whatever it was asked.
        peer.answers(xid, LAST_FLOWS, &[SHUT_IN, SHUT_OUT]).await;
    });
    assert_eq!(blocks.unwrap(), []);
}

#[tokio::test(start_paused = true)]
async fn answers_find_who_asked_in_any_order() {
    let (mut peer, switch) = connected(4).await;
    let (seven, eight, ()) = tokio::join!(switch.blocks(7), switch.blocks(8), async {
        let (first, seven) = peer.is_asked().await;
        let (second, eight) = peer.is_asked().await;
        assert_eq!((seven, eight), (7, 8));
        peer.answers(second, LAST_FLOWS, &[]).await;
        peer.answers(first, MORE_FLOWS, &[SHUT_IN]).await;
        peer.answers(first, LAST_FLOWS, &[]).await;
        let (third, _) = peer.is_asked().await;
        peer.answers(third, LAST_FLOWS, &[SHUT_IN, SHUT_OUT]).await;
    });
    assert_eq!(seven.unwrap().len(), 2);
    assert_eq!(eight.unwrap(), []);
}

#[tokio::test(start_paused = true)]
async fn a_question_that_is_refused_fails_alone() {
    let (mut peer, switch) = connected(4).await;
    let sent = packet_out(&switch, 1, b"").unwrap();
    let barrier = (peer.hear().await, peer.hear().await).1.xid;
    let asking = asking(&switch).await;
    let (xid, _) = peer.is_asked().await;
    // In the middle of the answer.
    peer.answers(xid, MORE_FLOWS, &[SHUT_IN]).await;
    peer.tell(4, 1, xid, b"\0\x01\0\x05").await;
    let error = asking.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::RefusedQuestion(_)), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the switch refuses to tell about flows: it does not allow that (OFPBRC_EPERM)"
    );
    peer.tell(4, 21, barrier, b"").await;
    sent.processed().await.unwrap();
    assert_eq!(found(&mut peer, &switch).await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_makes_no_sense_fails_its_question_alone() {
    let (mut peer, switch) = connected(4).await;
    for nonsense in [&SHUT_IN[..63], b"\0", b"\xff\xff\0\0\0\0\0\0"] {
        let (blocks, ()) = tokio::join!(switch.blocks(7), async {
            let (xid, _) = peer.is_asked().await;
            peer.answers(xid, LAST_FLOWS, &[nonsense]).await;
        });
        let error = blocks.unwrap_err();
        assert!(matches!(error, Error::Protocol(_)), "{error:?}");
        assert!(
            error.to_string().contains("a flow's description"),
            "{error}"
        );
    }
    // Not even a header.
    let (blocks, ()) = tokio::join!(switch.blocks(7), async {
        let (xid, _) = peer.is_asked().await;
        peer.tell(4, 19, xid, b"\0\x01\0").await;
    });
    assert!(matches!(blocks, Err(Error::Protocol(_))), "{blocks:?}");
    assert_eq!(found(&mut peer, &switch).await.len(), 2);
}

#[rstest]
#[case::in_long_parts(60_000)]
#[case::in_short_parts(0)]
#[tokio::test(start_paused = true)]
async fn an_answer_without_end_ends_the_connection(#[case] length: usize) {
    let (mut peer, switch) = connected(4).await;
    let asking = asking(&switch).await;
    let (xid, _) = peer.is_asked().await;
    let body = [MORE_FLOWS, &vec![0; length]].concat();
    let part = told(4, 19, xid, &body);
    let mut said = 0;
    let error = tokio::select! {
        () = async {
            loop {
                peer.say(&part).await;
                said += body.len();
            }
        } => unreachable!(),
        error = switch.ended() => error,
    };
    assert!(matches!(error, Error::Stuck(_)), "{error:?}");
    // What the stream between has room for counts as said.
    assert!((1 << 20..(1 << 20) + 3 * AMPLE).contains(&said), "{said}");
    let error = asking.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Stuck(_)), "{error:?}");
    assert!(matches!(switch.blocks(7).await, Err(Error::Stuck(_))));
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_hangs_up_fails_what_was_asked() {
    let (mut peer, switch) = connected(4).await;
    let asking = asking(&switch).await;
    let (xid, _) = peer.is_asked().await;
    peer.answers(xid, MORE_FLOWS, &[SHUT_IN]).await;
    drop(peer);
    let error = asking.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Closed), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn questions_that_nobody_waits_for_are_in_nobodys_way() {
    let (mut peer, switch) = connected(4).await;
    for _ in 0..3000 {
        let asked = timeout(Duration::ZERO, switch.blocks(7)).await;
        assert!(asked.is_err(), "{asked:?}");
        // The switch reads, and answers echoes and barriers alone.
        let (xid, _) = peer.is_asked().await;
        assert!(xid > 0);
    }
    let sent = packet_out(&switch, 1, b"").unwrap();
    let barrier = (peer.hear().await, peer.hear().await).1.xid;
    peer.tell(4, 21, barrier, b"").await;
    sent.processed().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn questions_that_are_waited_for_are_bounded() {
    let (_peer, switch) = connected(4).await;
    let mut asked: Vec<_> = std::iter::repeat_with(|| Box::pin(switch.blocks(7)))
        .take(1025)
        .collect();
    let mut context = Context::from_waker(Waker::noop());
    let error = asked
        .iter_mut()
        .find_map(|asked| match asked.as_mut().poll(&mut context) {
            Poll::Ready(outcome) => Some(outcome.unwrap_err()),
            Poll::Pending => None,
        });
    assert!(matches!(error, Some(Error::Stuck(_))), "{error:?}");
    assert!(switch.is_alive());
}

#[rstest]
#[case(1)]
#[case(2)]
#[case(3)]
#[tokio::test(start_paused = true)]
async fn before_1_3_nothing_is_asked_and_nothing_removed(#[case] version: u8) {
    let (mut peer, switch) = connected(4).await;
    let blocks = found(&mut peer, &switch).await;
    // The bridge's `protocols` have been changed since.
    let (mut peer, switch) = connected(version).await;
    assert_eq!(switch.blocks(7).await.unwrap(), []);
    let sent = switch.remove(&blocks).unwrap();
    let (request, reply) = if version == 1 { (18, 19) } else { (20, 21) };
    let barrier = peer.hear().await;
    assert_eq!((barrier.kind, barrier.body.len()), (request, 0));
    peer.tell(version, reply, barrier.xid, b"").await;
    sent.processed().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn removals_and_a_barrier_are_one_write() {
    let (mut peer, switch) = connected(4).await;
    let blocks = found(&mut peer, &switch).await;
    // Written before anybody else has had a chance to run.
    let sent = switch.remove(&blocks).unwrap();
    let written = sent.written_at_once().expect("there is room");
    let first = peer.hear().await;
    let second = peer.hear().await;
    let barrier = peer.hear().await;
    assert_eq!((first.version, first.kind, barrier.kind), (4, 14, 20));
    assert_eq!([second.xid, barrier.xid], [first.xid + 1, first.xid + 2]);
    for (removal, flow) in [(&first, SHUT_IN), (&second, SHUT_OUT)] {
        // Cookie, table, match.
        assert_eq!(removal.body[..8], flow[24..32]);
        assert_eq!(removal.body[16..18], [flow[2], 4]);
        assert_eq!(removal.body[40..], flow[48..]);
    }
    peer.tell(4, 21, barrier.xid, b"").await;
    assert!(sent.processed().await.unwrap() >= written);
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_is_refused_fails_nothing() {
    let (mut peer, switch) = connected(4).await;
    let blocks = found(&mut peer, &switch).await;
    let sent = switch.remove(&blocks).unwrap();
    let other = packet_out(&switch, 9, b"").unwrap();
    let mut heard = Vec::new();
    for _ in 0..5 {
        heard.push(peer.hear().await);
    }
    let kinds: Vec<_> = heard.iter().map(|message| message.kind).collect();
    assert_eq!(kinds, [14, 14, 20, 13, 20]);
    // Both: a flow-mod that failed, for want of permission.
    for removal in &heard[..2] {
        peer.tell(4, 1, removal.xid, b"\0\x05\0\x04").await;
    }
    peer.tell(4, 21, heard[2].xid, b"").await;
    sent.processed().await.unwrap();
    // It is told apart from what else was sent.
    peer.tell(4, 1, heard[3].xid, b"\0\x01\0\x0b").await;
    peer.tell(4, 21, heard[4].xid, b"").await;
    let error = other.processed().await.unwrap_err();
    assert!(
        matches!(error, Error::RefusedPacketOut { in_port: 9, .. }),
        "{error:?}"
    );
    // A barrier that is refused is.
    let sent = switch.remove(&blocks[..1]).unwrap();
    let barrier = (peer.hear().await, peer.hear().await).1.xid;
    peer.tell(4, 1, barrier, b"\0\x01\0\x01").await;
    let error = sent.processed().await.unwrap_err();
    assert!(matches!(error, Error::RefusedBarrier(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn what_shuts_ports_goes_ahead_of_the_frames() {
    let (mut peer, switch) = connected(4).await;
    let blocks = found(&mut peer, &switch).await;
    let ports = PacketOuts::opening([(7, MAC), (8, MAC)]).unwrap();
    let sent = switch.put(&ports, &blocks).unwrap();
    let mut heard = Vec::new();
    for _ in 0..5 {
        heard.push(peer.hear().await);
    }
    let kinds: Vec<_> = heard.iter().map(|message| message.kind).collect();
    assert_eq!(kinds, [14, 14, 13, 13, 20]);
    // A removal, then the second frame.
    peer.tell(4, 1, heard[1].xid, b"\0\x05\0\x04").await;
    peer.tell(4, 1, heard[3].xid, b"\0\x01\0\x0b").await;
    peer.tell(4, 21, heard[4].xid, b"").await;
    let error = sent.processed().await.unwrap_err();
    assert!(
        matches!(error, Error::RefusedPacketOut { in_port: 8, .. }),
        "{error:?}"
    );
}
