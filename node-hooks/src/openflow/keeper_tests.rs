use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::mpsc;

use super::*;

/// A keeper whose attempts meet these, in turn, and fail after that; and when each attempt was made.
struct Scene {
    keeper: Keeper,
    attempts: mpsc::UnboundedReceiver<Instant>,
}

impl Scene {
    fn new(streams: impl IntoIterator<Item = Option<DuplexStream>>) -> Self {
        let streams: VecDeque<_> = streams.into_iter().collect();
        let streams = Arc::new(Mutex::new(streams));
        let (made, attempts) = mpsc::unbounded_channel();
        let keeper = Keeper::connecting(move || {
            made.send(Instant::now()).unwrap();
            let stream = streams.lock().unwrap().pop_front().flatten();
            async move {
                let Some(stream) = stream else {
                    return Err(Error::Closed);
                };
                let (read, write) = split(stream);
                Switch::greet("test", read, write).await
            }
        });
        Self { keeper, attempts }
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
    assert!(!scene.keeper.is_warm());
    assert!(matches!(
        scene.keeper.send(&packets()),
        Err(Error::Cold(None))
    ));
    scene.warm().await;
    assert!(scene.keeper.is_warm());
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
async fn who_wants_to_send_has_it_tried_at_once_and_once() {
    let (stream, mut end) = switch().await;
    let mut streams: Vec<Option<DuplexStream>> = std::iter::repeat_with(|| None).take(8).collect();
    streams.push(None);
    streams.push(None);
    streams.push(Some(stream));
    let mut scene = Scene::new(streams);
    let mut last = Instant::now();
    for _ in 0..9 {
        last = scene.attempts.recv().await.unwrap();
    }
    let began = Instant::now();
    assert!(began - last < LONGEST_PAUSE);
    let packets = packets();
    let sending = scene.keeper.send_when_warm(&packets);
    let watching = async {
        let first = scene.attempts.recv().await.unwrap();
        let second = scene.attempts.recv().await.unwrap();
        (first, second)
    };
    let (sent, (first, second)) = tokio::join!(sending, watching);
    assert_eq!(first, began);
    assert!(second - first >= LONGEST_PAUSE);
    assert!(sent.unwrap().written_at_once().is_some());
    has_heard_a_packet_out(&mut end).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_with_the_packets_is_not_waited_out() {
    let (stream, _end) = switch().await;
    let scene = Scene::new([Some(stream)]);
    scene.warm().await;
    let mut long = PacketOuts::new();
    long.push(7, vec![0; 60_000]).unwrap();
    let stuck = loop {
        match scene.keeper.send_when_warm(&long).await {
            Ok(sent) => drop(sent),
            Err(error) => break error,
        }
    };
    assert!(matches!(stuck, Error::Stuck(_)), "{stuck:?}");
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
