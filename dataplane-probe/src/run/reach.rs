//! The beginning: TCP and UDP pass, and the stream is open, whoever opened it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::Instant;

use super::callee::{Callee, Link};
use super::control::Control;
use super::{Config, Error, HELLO_EVERY, RECEIVE_BUFFER, RECEIVE_TIMEOUT, local};
use crate::clock::nanos;
use crate::control::{Connections, Request};
use crate::sys::{self, Batch, Wait};
use crate::wire::{Body, MAX_PACKET, MIN_PACKET, Packet};

/// Makes sure that UDP passes, and opens the stream, if there is to be one.
pub(super) fn reach(
    config: &Config,
    control: &Control,
    deadline: Instant,
    begun: Instant,
) -> Result<(Link, Option<TcpStream>), Error> {
    let target = config.target;
    let socket = open_udp(target).map_err(local("open a UDP socket"))?;
    greet(&socket, control.session(), deadline)
        .map_err(local("send UDP"))?
        .then_some(())
        .ok_or_else(|| Error::UdpUnreachable {
            target,
            waited: begun.elapsed(),
        })?;
    let stream = match config.stream_every {
        Some(_) => Some(
            control
                .open_stream(deadline)
                .map_err(|failure| failure.into_error(target, begun))?,
        ),
        None => None,
    };
    let callers = None;
    Ok((Link { socket, callers }, stream))
}

/// Has the reflector call, until its UDP and its stream, if there is to be one, have come.
pub(super) fn be_called(
    config: &Config,
    callee: &Callee,
    control: &Control,
    deadline: Instant,
    begun: Instant,
) -> Result<(Link, Option<TcpStream>), Error> {
    let target = config.target;
    let missing = |what| Error::NotCalled {
        target,
        at: callee.address(),
        what,
        waited: begun.elapsed(),
    };
    let (link, callers) = callee.link().map_err(local("share a socket"))?;
    let request = Request::Call {
        session: control.session(),
        to: callee.address(),
        stream: config.stream_every.is_some(),
        connections: config.connect_every.map(|every| Connections {
            every_ns: nanos(every),
            timeout_ns: nanos(config.connect_timeout),
        }),
    };
    loop {
        control
            .until(&request, deadline)
            .map_err(|failure| failure.into_error(target, begun))?;
        if link
            .is_greeted(control.session())
            .map_err(local("receive UDP"))?
        {
            break;
        }
        if Instant::now() >= deadline {
            return Err(missing("UDP packet"));
        }
    }
    if config.stream_every.is_none() {
        return Ok((link, None));
    }
    let stream = callee
        .stream(control.session(), &callers, deadline)
        .map_err(local("accept a connection"))?;
    let stream = stream.ok_or_else(|| missing("TCP connection"))?;
    Ok((link, Some(stream)))
}

fn open_udp(target: SocketAddr) -> io::Result<UdpSocket> {
    let anywhere: IpAddr = if target.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((anywhere, 0))?;
    sys::observe_receives(socket.as_fd())?;
    sys::set_receive_buffer(socket.as_fd(), RECEIVE_BUFFER)?;
    socket.connect(target)?;
    Ok(socket)
}

/// Sends greetings until one is answered; false if none was by the deadline.
fn greet(socket: &UdpSocket, session: u64, deadline: Instant) -> io::Result<bool> {
    let mut hello = [0; MIN_PACKET];
    Packet {
        session,
        body: Body::Hello,
    }
    .encode(&mut hello);
    let mut batch = Batch::new(MAX_PACKET);
    socket.set_read_timeout(Some(HELLO_EVERY))?;
    while Instant::now() < deadline {
        let sent = Instant::now();
        // An ICMP answer to an earlier one fails this call; the deadline decides, not the first error.
        let failed = socket.send(&hello).is_err();
        let count = batch
            .receive(socket.as_fd(), Wait::UntilTimeout)
            .unwrap_or(0);
        let welcome = |packet: Packet| packet.session == session && packet.body == Body::Welcome;
        if batch
            .datagrams(count)
            .any(|datagram| Packet::decode(datagram.bytes).is_ok_and(welcome))
        {
            socket.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
            return Ok(true);
        }
        if failed || sent.elapsed() < HELLO_EVERY {
            thread::sleep(HELLO_EVERY.saturating_sub(sent.elapsed()));
        }
    }
    Ok(false)
}
