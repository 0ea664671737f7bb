//! Asking the programs under test for their metrics and their readiness. The caller is in central's network namespace.

use std::io::{Error, Result};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longer than a program that serves takes to answer, even on a busy machine. One that stands still takes connections all
/// the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// One request; the answer's body, if it is a good one.
pub(super) async fn get(address: &str, path: &str) -> Result<String> {
    let answer = ask(address, path).await?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(Error::other(answer)),
    }
}

/// Whether who is there says that it is ready.
pub(super) async fn is_ready(address: &str) -> Result<bool> {
    Ok(ask(address, "/readyz").await?.starts_with("HTTP/1.1 200"))
}

/// One request, and all of the answer.
pub(super) async fn ask(address: &str, path: &str) -> Result<String> {
    timeout(PATIENCE, exchange(address, path)).await?
}

async fn exchange(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
