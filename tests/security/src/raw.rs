//! Calls of any method with any bytes as message.

use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder, Streaming};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Request, Status};
use wire::client::Connection;

/// Messages as they are.
#[derive(Debug, Clone, Copy, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        prost::bytes::BufMut::put_slice(buffer, &item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; prost::bytes::Buf::remaining(buffer)];
        prost::bytes::Buf::copy_to_slice(buffer, &mut bytes);
        Ok(Some(bytes))
    }
}

/// Sends one message; gives the first of the answer, if there is one.
///
/// # Errors
/// With the status that the server or the transport ended the call by.
pub async fn call(connection: Connection, path: &str, message: Vec<u8>) -> Result<Option<Vec<u8>>, Status> {
    unread_stream(connection, path, message).await?.message().await
}

/// The answer's stream, of which nothing is read yet.
///
/// # Errors
/// As [`call`].
pub async fn unread_stream(
    connection: Connection,
    path: &str,
    message: Vec<u8>,
) -> Result<Streaming<Vec<u8>>, Status> {
    let mut client = Grpc::new(connection.traced());
    client.ready().await.map_err(|error| Status::unavailable(wire::status::chain(&error)))?;
    let path = PathAndQuery::try_from(path).map_err(|error| Status::internal(error.to_string()))?;
    Ok(client.server_streaming(Request::new(message), path, RawCodec).await?.into_inner())
}
