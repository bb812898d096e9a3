# The build runs on the machine's own architecture and compiles for the target's, so arm64 needs no emulation.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY .ci/build ./.ci/build
COPY cdc ./cdc
COPY outbox ./outbox
COPY sender ./sender
COPY cmd/walhook ./cmd/walhook
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=dev
ARG COMMIT=unknown
RUN GOOS=$TARGETOS GOARCH=$TARGETARCH VERSION=$VERSION COMMIT=$COMMIT .ci/build /out/walhook \
 && echo "walhook:x:65532:65532::/:/walhook" > /out/passwd

FROM scratch
ARG VERSION=dev
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="walhook" \
      org.opencontainers.image.description="Turns rows of a Postgres outbox table into webhooks" \
      org.opencontainers.image.source="https://github.com/walhook/walhook" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/passwd /etc/passwd
COPY --from=build /out/walhook /walhook
USER 65532:65532
EXPOSE 8080
# Whether the process works, not whether it has the slot: one that stands by or waits for the database is well.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/walhook", "check", "--live"]
ENTRYPOINT ["/walhook"]
CMD ["run"]
