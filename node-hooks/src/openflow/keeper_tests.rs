use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::mpsc;

use super::*;
use crate::openflow::blocks::tests::{SHUT_IN, SHUT_OUT};

/// A keeper whose attempts meet these, in turn, and fail after that; and when each attempt was made.
struct Scene {
    keeper: Keeper,
    attempts: mpsc::UnboundedReceiver<Instant>,
    /// What it tells of ports that are to be open and are not.
    blocked: mpsc::UnboundedReceiver<(Instant, BTreeSet<u16>)>,
}

impl Scene {
    fn new(streams: impl IntoIterator<Item = Option<DuplexStream>>) -> Self {
        let streams: VecDeque<_> = streams.into_iter().collect();
        let streams = Arc::new(Mutex::new(streams));
        let (made, attempts) = mpsc::unbounded_channel();
        let (tells, blocked) = mpsc::unbounded_channel();
        let connect = move || {
            made.send(Instant::now()).unwrap();
            let stream = streams.lock().unwrap().pop_front().flatten();
            async move {
                let Some(stream) = stream else {
                    return Err(Error::Closed);
                };
                let (read, write) = split(stream);
                Switch::greet("test", read, write).await
            }
        };
        let keeper = Keeper::connecting(connect, move |ports| {
            let _ = tells.send((Instant::now(), ports));
        });
        Self {
            keeper,
            attempts,
            blocked,
        }
    }

    async fn warm(&self) {
        let mut state = self.keeper.state();
        state
            .wait_for(|state| matches!(state, State::Warm(_)))
            .await
            .unwrap();
    }

    async fn cold_again(&self) {
        let mut state = self.keeper.state();
        state
            .wait_for(|state| {
                matches!(
                    state,
                    State::Cold {
                        last_error: Some(_)
                    }
                )
            })
            .await
            .unwrap();
    }
}

/// A switch that has said hello.
async fn switch() -> (DuplexStream, DuplexStream) {
    let (ours, mut theirs) = duplex(1 << 16);
    theirs
        .write_all(b"\x04\x00\x00\x08\0\0\0\x01")
        .await
        .unwrap();
    (ours, theirs)
}

fn packets() -> PacketOuts {
    let mut packets = PacketOuts::new();
    packets.push(7, vec![0; 60]).unwrap();
    packets
}

async fn has_heard_a_packet_out(switch: &mut DuplexStream) {
    let mut bytes = [0; 16 + 8];
    switch.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes[16 + 1], 13);
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_made_again() {
    let (first, first_end) = switch().await;
    let (second, mut second_end) = switch().await;
    let scene = Scene::new([Some(first), Some(second)]);
    assert!(matches!(
        scene.keeper.send(&packets()),
        Err(Error::Cold(None))
    ));
    scene.warm().await;
    drop(first_end);
    scene.cold_again().await;
    let error = scene.keeper.send(&packets()).unwrap_err();
    assert!(matches!(error, Error::Cold(Some(_))), "{error:?}");
    assert!(
        error.to_string().contains("closed the connection"),
        "{error}"
    );
    scene.warm().await;
    let sent = scene.keeper.send(&packets()).unwrap();
    assert!(sent.written_at_once().is_some());
    has_heard_a_packet_out(&mut second_end).await;
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_and_are_bounded() {
    let mut scene = Scene::new([]);
    let mut times = Vec::new();
    for _ in 0..12 {
        times.push(scene.attempts.recv().await.unwrap());
    }
    let pauses: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // With jitter a pause is up to twice as long.
    assert!(pauses[0] >= FIRST_PAUSE && pauses[0] <= 2 * FIRST_PAUSE);
    assert!(pauses[10] >= LONGEST_PAUSE && pauses[10] <= 2 * LONGEST_PAUSE);
}

#[tokio::test(start_paused = true)]
async fn a_keeper_that_is_dropped_hangs_up() {
    let (stream, mut end) = switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    let state = scene.keeper.state();
    drop(scene);
    let mut rest = Vec::new();
    // The hello, and the end, although somebody still looks.
    end.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest.len(), 16);
    assert!(matches!(&*state.borrow(), State::Cold { .. }));
}

/// What a switch tells when it is asked what shuts its ports.
#[derive(Debug, Default)]
struct Flows {
    /// The ports that are shut; none where it does not say.
    shut: Mutex<Option<BTreeSet<u8>>>,
    refuses: Mutex<bool>,
    asked: AtomicUsize,
    /// Who holds this keeps answers back.
    answers: tokio::sync::Mutex<()>,
}

impl Flows {
    fn shutting(ports: impl IntoIterator<Item = u8>) -> Arc<Self> {
        let flows = Self::default();
        flows.shut(ports);
        Arc::new(flows)
    }

    fn shut(&self, ports: impl IntoIterator<Item = u8>) {
        *self.shut.lock().unwrap() = Some(ports.into_iter().collect());
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// The answer to a message.
    fn answer(&self, kind: u8, xid: &[u8], body: &[u8]) -> Vec<u8> {
        let message = |kind, body: &[u8]| {
            let length = u16::try_from(8 + body.len()).unwrap().to_be_bytes();
            [&[4, kind], &length[..], xid, body].concat()
        };
        match kind {
            2 => message(3, body),
            20 => message(21, b""),
            18 if *self.refuses.lock().unwrap() => message(1, b"\0\x01\0\x05"),
            18 => {
                self.asked.fetch_add(1, Ordering::Relaxed);
                let Some(shut) = &*self.shut.lock().unwrap() else {
                    return Vec::new();
                };
                // The last byte of the match's port, or of the cookie, which is the port's too.
                let port = body[if body.len() == 48 { 31 } else { 51 }];
                let mut flows = Vec::new();
                if shut.contains(&port) {
                    let mut incoming = SHUT_IN.to_vec();
                    (incoming[31], incoming[59]) = (port, port);
                    flows.extend(incoming);
                    let mut outgoing = SHUT_OUT.to_vec();
                    outgoing[31] = port;
                    flows.extend(outgoing);
                }
                message(19, &[b"\0\x01\0\0\0\0\0\0", &*flows].concat())
            }
            _ => Vec::new(),
        }
    }

    /// A switch that has these flows, until its connection or the task ends.
    async fn switch(self: &Arc<Self>) -> (DuplexStream, tokio::task::JoinHandle<()>) {
        let (ours, mut end) = switch().await;
        let flows = self.clone();
        let task = tokio::spawn(async move {
            let mut header = [0; 8];
            while end.read_exact(&mut header).await.is_ok() {
                let [_, kind, high, low, xid @ ..] = header;
                let length = usize::from(u16::from_be_bytes([high, low]));
                let mut body = vec![0; length - 8];
                end.read_exact(&mut body).await.unwrap();
                let answer = flows.answer(kind, &xid, &body);
                let _answers = flows.answers.lock().await;
                end.write_all(&answer).await.unwrap();
            }
        });
        (ours, task)
    }
}

impl Scene {
    /// How many flows are known to shut a port.
    fn known(&self, port: u32) -> usize {
        let mut packets = PacketOuts::new();
        packets.push(port, vec![0; 60]).unwrap();
        let blocks = self.keeper.blocks(&packets);
        blocks.map_or(0, |blocks| blocks.len())
    }

    /// Waits until so many are, and tells how long that took.
    async fn until_known(&self, port: u32, count: usize) -> Duration {
        let began = Instant::now();
        while self.known(port) != count {
            assert!(began.elapsed() < 100 * LOOK, "{port} by {count}");
            sleep(LOOK / 20).await;
        }
        began.elapsed()
    }
}

#[tokio::test(start_paused = true)]
async fn what_shuts_the_ports_that_are_to_be_opened_is_found_at_once() {
    let flows = Flows::shutting([7, 9]);
    let (stream, _task) = flows.switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    // Nobody asks for the sake of asking.
    sleep(10 * LOOK).await;
    assert_eq!((scene.known(7), flows.asked()), (0, 0));
    scene.keeper.expect_to_open([7, 8].into());
    assert!(scene.until_known(7, 2).await < LOOK);
    // One that is open, and one that is shut and none of ours.
    assert_eq!((scene.known(8), scene.known(9)), (0, 0));
    // Of all ports, where there are several, or of none.
    scene.keeper.expect_to_open([7, 8, 9].into());
    assert!(scene.until_known(9, 2).await < LOOK);
    let packets = |ports: &[u32]| {
        let mut packets = PacketOuts::new();
        for &port in ports {
            packets.push(port, vec![0; 60]).unwrap();
        }
        packets
    };
    assert_eq!(scene.keeper.blocks(&packets(&[7, 8, 9])), None);
    let blocks = scene.keeper.blocks(&packets(&[7, 9])).unwrap();
    assert_eq!(blocks.len(), 4);
    let sent = scene.keeper.switch().unwrap().remove(&blocks).unwrap();
    sent.processed().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn ports_may_be_expected_before_there_is_a_connection() {
    let flows = Flows::shutting([7]);
    let (stream, _task) = flows.switch().await;
    let scene = Scene::new([None, Some(stream)]);
    scene.keeper.expect_to_open([7].into());
    assert_eq!(scene.known(7), 0);
    scene.warm().await;
    assert!(scene.until_known(7, 2).await < LOOK);
}

#[tokio::test(start_paused = true)]
async fn a_port_that_is_shut_later_or_opened_is_noticed() {
    let flows = Flows::shutting([]);
    let (stream, _task) = flows.switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7].into());
    sleep(5 * LOOK).await;
    assert_eq!(scene.known(7), 0);
    flows.shut([7]);
    assert!(scene.until_known(7, 2).await <= 2 * LOOK);
    flows.shut([]);
    assert!(scene.until_known(7, 0).await <= 2 * LOOK);
}

#[tokio::test(start_paused = true)]
async fn ports_that_are_no_longer_expected_are_forgotten() {
    let flows = Flows::shutting([7, 8]);
    let (stream, _task) = flows.switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7, 8].into());
    scene.until_known(8, 2).await;
    scene.keeper.expect_to_open([8].into());
    assert_eq!((scene.known(7), scene.known(8)), (0, 2));
    sleep(5 * LOOK).await;
    assert_eq!((scene.known(7), scene.known(8)), (0, 2));
    scene.keeper.expect_to_open(BTreeSet::new());
    assert_eq!(scene.known(8), 0);
    sleep(LOOK).await;
    // Nobody asks any more.
    let asked = flows.asked();
    sleep(10 * LOOK).await;
    assert_eq!((scene.known(8), flows.asked()), (0, asked));
    scene.keeper.expect_to_open([8].into());
    assert!(scene.until_known(8, 2).await < LOOK);
}

#[tokio::test(start_paused = true)]
async fn what_shuts_ports_is_found_again_on_the_next_connection() {
    let flows = Flows::shutting([7]);
    let (first, first_task) = flows.switch().await;
    let later = Flows::shutting([8]);
    let (second, _second_task) = later.switch().await;
    let scene = Scene::new([Some(first), Some(second)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7, 8].into());
    scene.until_known(7, 2).await;
    first_task.abort();
    scene.cold_again().await;
    scene.warm().await;
    // It is another switch's word that counts now.
    scene.until_known(8, 2).await;
    assert_eq!(scene.known(7), 0);
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_refuses_to_tell_is_asked_again_and_sends_all_the_same() {
    let flows = Flows::shutting([7]);
    *flows.refuses.lock().unwrap() = true;
    let (stream, _task) = flows.switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7].into());
    sleep(5 * LOOK).await;
    assert_eq!(scene.known(7), 0);
    let sent = scene.keeper.send(&packets()).unwrap();
    sent.processed().await.unwrap();
    *flows.refuses.lock().unwrap() = false;
    assert!(scene.until_known(7, 2).await <= 2 * LOOK);
    // What was known stays known: it is removed only where it is still there.
    *flows.refuses.lock().unwrap() = true;
    sleep(5 * LOOK).await;
    assert_eq!(scene.known(7), 2);
}

#[tokio::test(start_paused = true)]
async fn a_switch_that_does_not_tell_is_not_waited_for_and_sends_all_the_same() {
    let flows = Arc::new(Flows::default());
    let (stream, _task) = flows.switch().await;
    let mut scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7].into());
    // An hour, which is more questions than answers may be waited for.
    sleep(Duration::from_hours(1)).await;
    assert!(flows.asked() > 1024, "{}", flows.asked());
    let sent = scene.keeper.send(&packets()).unwrap();
    sent.processed().await.unwrap();
    flows.shut([7]);
    assert!(scene.until_known(7, 2).await <= ANSWER + 2 * LOOK);
    // All the time on one connection.
    scene.attempts.recv().await.unwrap();
    assert!(scene.attempts.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_keeper_that_is_dropped_asks_no_more() {
    let flows = Flows::shutting([7]);
    let (stream, task) = flows.switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7].into());
    scene.until_known(7, 2).await;
    drop(scene);
    // It has hung up.
    task.await.unwrap();
}

impl Scene {
    /// What is told next of ports that are to be open, and how long that took.
    async fn next_blocked(&mut self) -> (Duration, Vec<u16>) {
        let began = Instant::now();
        let (at, ports) = self.blocked.recv().await.unwrap();
        (at - began, ports.into_iter().collect())
    }
}

#[tokio::test(start_paused = true)]
async fn ports_that_are_to_be_open_are_looked_at_often_and_told_of_while_they_are_shut() {
    let flows = Flows::shutting([7, 8]);
    let (stream, _task) = flows.switch().await;
    let mut scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7, 8].into());
    scene.until_known(8, 2).await;
    sleep(5 * LOOK).await;
    assert!(scene.blocked.try_recv().is_err(), "they may be shut");
    // One of them, and one that it is not to look at.
    scene.keeper.expect_open([7, 9].into());
    let (at_once, ports) = scene.next_blocked().await;
    assert!(at_once < LOOK_OPEN && ports == [7], "{at_once:?} {ports:?}");
    for _ in 0..12 {
        let (after, ports) = scene.next_blocked().await;
        assert!(after <= LOOK_OPEN && ports == [7], "{after:?} {ports:?}");
    }
    flows.shut([8]);
    scene.until_known(7, 0).await;
    while scene.blocked.try_recv().is_ok() {}
    sleep(5 * LOOK).await;
    assert!(scene.blocked.try_recv().is_err(), "it is open");
    // As when ovn-controller starts anew.
    flows.shut([7, 8]);
    let (after, ports) = scene.next_blocked().await;
    assert!(
        after <= 2 * LOOK_OPEN && ports == [7],
        "{after:?} {ports:?}"
    );
    // It is over.
    scene.keeper.expect_open(BTreeSet::new());
    while scene.blocked.try_recv().is_ok() {}
    sleep(5 * LOOK).await;
    assert!(scene.blocked.try_recv().is_err());
    assert_eq!(scene.known(7), 2, "it may be opened all the same");
}

#[tokio::test(start_paused = true)]
async fn other_ports_are_looked_at_no_more_often_for_it() {
    let flows = Flows::shutting([]);
    let (stream, _task) = flows.switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7, 8].into());
    sleep(10 * LOOK).await;
    let before = flows.asked();
    scene.keeper.expect_open([7].into());
    sleep(10 * LOOK).await;
    // Ten for the one, fifty for the other; and one at once for each.
    let asked = flows.asked() - before;
    assert!((55..=65).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn what_was_asked_before_an_opening_is_not_told_after_it() {
    let flows = Flows::shutting([7]);
    let (stream, _task) = flows.switch().await;
    let mut scene = Scene::new([Some(stream)]);
    scene.warm().await;
    scene.keeper.expect_to_open([7].into());
    scene.until_known(7, 2).await;
    let mut held = flows.answers.lock().await;
    let asked = flows.asked();
    scene.keeper.expect_open([7].into());
    // It asks for the port's flow, and then for those with its cookie.
    for question in 1..=2 {
        while flows.asked() < asked + question {
            sleep(Duration::from_millis(1)).await;
        }
        if question == 1 {
            drop(held);
            held = flows.answers.lock().await;
        }
    }
    // The second answer is on its way, and the port is opened.
    let mut packets = PacketOuts::new();
    packets.push(7, vec![0; 60]).unwrap();
    let blocks = scene.keeper.blocks_to_remove(&packets).unwrap();
    assert_eq!(blocks.len(), 2);
    flows.shut([]);
    drop(held);
    sleep(5 * LOOK).await;
    assert!(scene.blocked.try_recv().is_err());
}
