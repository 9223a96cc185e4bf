//! The files that a run has exported.

use super::remote::{connect, refused, show};
use crate::args::{DownloadArgs, RunIdArgs};
use crate::failure::Failure;
use crate::output::say;
use crate::{tables, units};
use anyhow::Context;
use checkpoint::digest_file;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use wire::client::{RunClient, run_client, within};
use wire::{limits, pb};

/// # Errors
/// When there is no such run, it has not exported, or there is no coordinator.
pub(crate) async fn list(args: RunIdArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let listed = artifacts(&mut run_client(channel), args.id).await?;
    show(&args.remote, &listed, |listed| tables::artifacts_table(&listed.artifacts))
}

async fn artifacts(client: &mut RunClient, id: String) -> Result<pb::ListArtifactsResponse, Failure> {
    let request = within(limits::QUICK_CALL, pb::ListArtifactsRequest { id });
    let listed = client.list_artifacts(request).await;
    Ok(listed.map_err(refused("the files cannot be listed"))?.into_inner())
}

/// Fetches every file, goes on with those that are there in part, and checks the digest of each.
///
/// # Errors
/// When a file cannot be written or is not what was exported.
pub(crate) async fn download(args: DownloadArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let mut client = run_client(channel).max_decoding_message_size(limits::MESSAGE_BYTES);
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("`{}` cannot be made", args.out.display()))
        .map_err(|error| Failure::failed(format!("{error:#}")))?;
    for artifact in artifacts(&mut client, args.id.clone()).await?.artifacts {
        fetch(&mut client, &args.id, &artifact, &args.out).await?;
        say(format!("{}  {}", artifact.name, units::bytes(artifact.size_bytes)));
    }
    Ok(())
}

async fn fetch(client: &mut RunClient, id: &str, artifact: &pb::Artifact, out: &Path) -> Result<(), Failure> {
    // A name comes from elsewhere and must not lead out of the folder.
    if Path::new(&artifact.name).file_name().is_none_or(|name| name != artifact.name.as_str()) {
        return Err(Failure::failed(format!("`{}` is no plain file name", artifact.name)));
    }
    let path = out.join(&artifact.name);
    let failed = |error: std::io::Error| Failure::failed(format!("`{}`: {error}", path.display()));
    let there = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
    let offset = if there > artifact.size_bytes { 0 } else { there };
    let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
    if offset == 0 {
        file.set_len(0).map_err(failed)?;
    }
    if offset < artifact.size_bytes || artifact.size_bytes == 0 {
        let message = pb::DownloadArtifactRequest { id: id.to_owned(), name: artifact.name.clone(), offset };
        let stream = client.download_artifact(message).await;
        let mut stream = stream.map_err(refused("the file cannot be fetched"))?.into_inner();
        while let Some(part) =
            stream.message().await.map_err(refused("the file broke off; run this again"))?
        {
            file.write_all(&part.data).map_err(failed)?;
        }
        file.sync_all().map_err(failed)?;
    }
    let (size_bytes, sha256) = digest_file(&path).map_err(failed)?;
    if size_bytes != artifact.size_bytes || sha256.to_string() != artifact.sha256 {
        let message = format!("`{}` is not what was exported; remove it and run this again", path.display());
        return Err(Failure::failed(message));
    }
    Ok(())
}
