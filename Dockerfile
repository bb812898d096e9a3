FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cdc ./cdc
COPY outbox ./outbox
COPY sender ./sender
COPY cmd ./cmd
ARG VERSION=dev
ARG COMMIT=unknown
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION} -X main.commitID=${COMMIT}" -o /out/walhook ./cmd/walhook \
 && echo "walhook:x:65532:65532::/:/walhook" > /out/passwd

FROM scratch
LABEL org.opencontainers.image.title="walhook" \
      org.opencontainers.image.description="Turns rows of a Postgres outbox table into webhooks" \
      org.opencontainers.image.source="https://github.com/walhook/walhook" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/passwd /etc/passwd
COPY --from=build /out/walhook /walhook
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/walhook"]
CMD ["run"]
