use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A message from the server.
///
/// Parameters and results stay unparsed until their reader is known: the rows of a large database
/// are then read straight into their types.
#[derive(Debug)]
pub(crate) enum Message {
    /// Wants an answer under the same id.
    Request {
        id: Box<RawValue>,
        method: String,
        params: Box<RawValue>,
    },
    Notification {
        method: String,
        params: Box<RawValue>,
    },
    /// Answers our request `id`.
    Response {
        id: u64,
        outcome: Result<Box<RawValue>, RpcError>,
    },
}

/// The `error` of a response, in whichever form the server gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RpcError {
    pub(crate) name: String,
    pub(crate) details: Option<String>,
}

#[derive(Deserialize)]
struct Envelope {
    id: Option<Box<RawValue>>,
    method: Option<String>,
    params: Option<Box<RawValue>>,
    result: Option<Box<RawValue>>,
    error: Option<Box<RawValue>>,
}

/// The two forms of errors: an `<error>` object (RFC 7047, section 3.1), and the bare string that
/// `ovsdb-server` uses for unknown methods and cancelled requests.
#[derive(Deserialize)]
#[serde(untagged)]
enum WireError {
    Object {
        error: String,
        details: Option<String>,
        syntax: Option<String>,
    },
    Name(String),
}

impl Message {
    pub(crate) fn parse(frame: &Bytes) -> Result<Self, String> {
        let envelope: Envelope =
            serde_json::from_slice(frame).map_err(|error| error.to_string())?;
        let Envelope {
            id,
            method,
            params,
            result,
            error,
        } = envelope;
        match (method, params, id) {
            (Some(method), Some(params), Some(id)) => Ok(Self::Request { id, method, params }),
            (Some(method), Some(params), None) => Ok(Self::Notification { method, params }),
            (Some(method), None, _) => Err(format!("method {method:?} without params")),
            (None, _, Some(id)) => Ok(Self::Response {
                id: id
                    .get()
                    .parse()
                    .map_err(|_| format!("a response to {id}, which is not an id of ours"))?,
                outcome: match (error, result) {
                    (Some(error), _) => Err(RpcError::parse(&error)),
                    (None, Some(result)) => Ok(result),
                    (None, None) => Ok(RawValue::NULL.to_owned()),
                },
            }),
            (None, _, None) => Err("neither a method nor an id".into()),
        }
    }
}

impl RpcError {
    fn parse(error: &RawValue) -> Self {
        match serde_json::from_str(error.get()) {
            Ok(WireError::Name(name)) => Self {
                name,
                details: None,
            },
            Ok(WireError::Object {
                error,
                details,
                syntax,
            }) => Self {
                name: error,
                details: match (details, syntax) {
                    (Some(details), Some(syntax)) => Some(format!("{details} in {syntax}")),
                    (details, syntax) => details.or(syntax),
                },
            },
            Err(_) => Self {
                name: error.get().to_owned(),
                details: None,
            },
        }
    }
}

// === what is sent ===

#[derive(Serialize)]
struct Request<'a, P> {
    id: Option<u64>,
    method: &'a str,
    params: P,
}

#[derive(Serialize)]
struct Response<'a> {
    id: &'a RawValue,
    result: Option<&'a RawValue>,
    error: Option<&'a str>,
}

/// Writes a request, or a notification where there is no `id`.
pub(crate) fn write_request(
    out: &mut BytesMut,
    id: Option<u64>,
    method: &str,
    params: &impl Serialize,
) -> Result<(), serde_json::Error> {
    serde_json::to_writer(out.writer(), &Request { id, method, params })
}

/// Writes the answer to a request of the server's.
pub(crate) fn write_response(
    out: &mut BytesMut,
    id: &RawValue,
    outcome: Result<&RawValue, &str>,
) -> Result<(), serde_json::Error> {
    let response = Response {
        id,
        result: outcome.ok(),
        error: outcome.err(),
    };
    serde_json::to_writer(out.writer(), &response)
}
